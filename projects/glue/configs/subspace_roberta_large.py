# Subspace tuning, Table 4 (arXiv:2407.05417), whose percentages are per mille of 355 million.
_base_ = '_base_/subspace.py'
model = 'FacebookAI/roberta-large'
paper = dict(table='subspace_roberta_large', unit=355_000)
