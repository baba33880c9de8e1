_base_ = 'dreambooth.py'
model = 'stable-diffusion-v1-5/stable-diffusion-v1-5'
resolution = 512
