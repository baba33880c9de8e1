_base_ = 'commonsense.py'
model = 'meta-llama/Meta-Llama-3-8B'
