# LieRA, Table 4: DeBERTaV3-base.
_base_ = '_base_/liera.py'
model = 'microsoft/deberta-v3-base'
paper = dict(table='liera_deberta_v3_base', unit=1_840_000)
