# Conv-Adapter: a depthwise separable bottleneck beside each convolution (arXiv:2208.07463).
peft = dict(type='mmpeft.PEFTHook', method=dict(type='ConvAdapter'))
