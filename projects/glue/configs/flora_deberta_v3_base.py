# FLoRA, Table 3 (arXiv:2405.14739), whose hyper-parameters are not printed: ours are those of
# Subspace tuning, whose Table 3 has the same results but for FLoRA of rank 2.
_base_ = '_base_/subspace.py'
model = 'microsoft/deberta-v3-base'
paper = dict(table='flora_deberta_v3_base', unit=1_000_000)
methods = dict(
    _delete_=True,
    full=dict(method='full', training=dict(learning_rate=2e-5)),
    bitfit=dict(method='bitfit'),
    houlsby_r32=dict(method='houlsby', arguments=dict(rank=32)),
    pfeiffer_r64=dict(method='pfeiffer', arguments=dict(rank=64)),
    adalora_r8=dict(method='adalora', arguments=dict(rank=8)),
    lora_r2=dict(method='lora', arguments=dict(rank=2)),
    dora_r2=dict(method='dora', arguments=dict(rank=2)),
    flora_r2=dict(method='flora', arguments=dict(rank=2)),
    lora_r8=dict(method='lora', arguments=dict(rank=8)),
    dora_r8=dict(method='dora', arguments=dict(rank=8)),
    flora_r8=dict(method='flora', arguments=dict(rank=8)),
)
