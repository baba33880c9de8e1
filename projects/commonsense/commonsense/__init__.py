"""Commonsense reasoning of LLaMA-style models by the protocol of LLM-Adapters."""
