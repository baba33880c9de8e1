# Subspace tuning, Tables 2 to 6 (arXiv:2407.05417). Not in the paper, and ours: the schedule, the
# warmup, the lengths (those of LieRA's Table 10) and the learning rate of full fine-tuning.
training = dict(
    per_device_train_batch_size=32,
    per_device_eval_batch_size=128,
    lr_scheduler_type='linear',
    warmup_ratio=0.1,
    group_by_length=True,
)
tasks = dict(
    mnli=dict(learning_rate=5e-4, num_train_epochs=7, max_length=256),
    sst2=dict(learning_rate=8e-4, num_train_epochs=24, max_length=128),
    cola=dict(learning_rate=5e-4, num_train_epochs=25, max_length=64),
    qqp=dict(learning_rate=5e-4, num_train_epochs=5, max_length=320),
    qnli=dict(learning_rate=1.2e-3, num_train_epochs=5, max_length=512),
    rte=dict(learning_rate=1.2e-3, num_train_epochs=50, max_length=320),
    mrpc=dict(learning_rate=1e-3, num_train_epochs=30, max_length=320),
    stsb=dict(learning_rate=2.2e-3, num_train_epochs=25, max_length=128),
    own=dict(learning_rate=1e-3, num_train_epochs=10, max_length=256),
)
scaled = dict(include=('key', 'value', r'intermediate\.dense'))
methods = dict(
    full=dict(method='full', training=dict(learning_rate=2e-5)),
    sam_parser=dict(method='sam_parser'),
    ia3=dict(method='ia3', targets=scaled),
    ssl=dict(method='ssl', targets=scaled),
    ssb=dict(method='ssb', targets=scaled),
    bitfit=dict(method='bitfit'),
)
for r in (2, 4, 8, 16):
    rank = dict(rank=r)
    methods |= {
        f'houlsby_r{4 * r}': dict(method='houlsby', arguments=dict(rank=4 * r)),
        f'pfeiffer_r{8 * r}': dict(method='pfeiffer', arguments=dict(rank=8 * r)),
        f'parallel_r{r}': dict(method='parallel', arguments=rank),
        f'lora_r{r}': dict(method='lora', arguments=rank),
        f'lora_mpc_o_r{r}': dict(method='lora_mpc_o', arguments=rank),
        f'lora_mpc_d_r{r}': dict(method='lora_mpc_d', arguments=rank),
        f'lora_mpc_n_r{r}': dict(method='lora_mpc_n', arguments=rank),
        f'trilora_r{r}': dict(method='trilora', arguments=rank),
        f'trilora_mpc_o_r{r}': dict(method='trilora_mpc_o', arguments=rank),
        f'adalora_no_mpc_o_r{r}': dict(method='adalora', arguments=dict(rank, orthogonality=0.0)),
        f'adalora_r{r}': dict(method='adalora', arguments=rank),
        f'flora_r{r}': dict(method='flora', arguments=rank),
        f'dora_r{r}': dict(method='dora', arguments=rank),
    }
del r, rank, scaled
