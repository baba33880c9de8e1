_base_ = 'commonsense.py'
model = 'huggyllama/llama-7b'
