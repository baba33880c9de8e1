_base_ = 'dreambooth.py'
model = 'stabilityai/stable-diffusion-xl-base-1.0'
resolution = 1024
