"""Methods on the 19 tasks of VTAB-1k by the protocol of LieRA (arXiv:2504.00851)."""
