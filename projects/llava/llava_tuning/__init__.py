"""Visual instruction tuning of LLaVA with adapters."""
