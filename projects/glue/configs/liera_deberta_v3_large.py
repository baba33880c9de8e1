# LieRA, Table 4: DeBERTaV3-large.
_base_ = '_base_/liera.py'
model = 'microsoft/deberta-v3-large'
paper = dict(table='liera_deberta_v3_large', unit=4_350_000)
