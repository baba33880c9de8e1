# LieRA, Tables 4 and 10 (arXiv:2504.00851). The paper prints no epochs: ours are those of Subspace
# tuning.
_base_ = 'subspace.py'
tasks = dict(
    mnli=dict(learning_rate=5e-3),
    sst2=dict(learning_rate=8e-3),
    cola=dict(learning_rate=8e-3),
    qqp=dict(learning_rate=1e-3),
    qnli=dict(learning_rate=5e-3),
    rte=dict(learning_rate=2e-3),
    mrpc=dict(learning_rate=1e-3),
    stsb=dict(learning_rate=5e-3),
)
methods = dict(
    _delete_=True,
    full=dict(method='full', training=dict(learning_rate=2e-5)),
    lora_r2=dict(method='lora', arguments=dict(rank=2, alpha=4)),
    liera_r2=dict(method='liera', arguments=dict(rank=2, alpha=4)),
    lora_r8=dict(method='lora', arguments=dict(rank=8, alpha=16)),
    liera_r8=dict(method='liera', arguments=dict(rank=8, alpha=16)),
)
