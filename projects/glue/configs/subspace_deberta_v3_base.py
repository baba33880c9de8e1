# Subspace tuning, Table 3 (arXiv:2407.05417), whose percentages are per mille of 184 million.
_base_ = '_base_/subspace.py'
model = 'microsoft/deberta-v3-base'
paper = dict(table='subspace_deberta_v3_base', unit=184_000)
