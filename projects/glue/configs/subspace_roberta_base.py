# Subspace tuning, Table 2 (arXiv:2407.05417), whose percentages are per mille of 125 million.
_base_ = '_base_/subspace.py'
model = 'FacebookAI/roberta-base'
paper = dict(table='subspace_roberta_base', unit=125_000)
