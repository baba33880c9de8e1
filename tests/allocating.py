"""A small network whose methods allocate during training, and runs of it."""

import io

import torch
from torch import nn

import mmpeft
from mmpeft.injection.site import named_adapters


class Network(nn.Module):
    """A convolution, a linear layer that runs twice, and one that shares its weight."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.hidden = nn.Linear(6, 6)
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.hidden.weight
        self.out = nn.Linear(6, 4)

    def forward(self, x):
        x = self.conv(x).tanh().mean((2, 3))
        for layer in (self.hidden, self.hidden, self.tied):
            x = x + layer(x).tanh()
        return self.out(x)


def network():
    torch.manual_seed(11)
    return Network().double()


def adapted_network(config, **targets):
    """The network with adapters, and the adapters by path."""
    model = network()
    torch.manual_seed(12)
    mmpeft.inject(model, config, targets)
    return model, named_adapters(model)


def loss_of(model, step, micro=0):
    """A loss with the data and the noise of one step."""
    torch.manual_seed(1000 * step + micro)
    x, y = torch.randn(8, 3, 6, 6).double(), torch.randint(4, (8,))
    loss = nn.functional.cross_entropy(model(x), y)
    term = mmpeft.penalty(model)
    return loss if term is None else loss + term


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def train(model, optimizer, steps, after=lambda step: None):
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        after(step + 1)


def started(config, *states):
    """Model, optimizer and allocation of a run of 60 steps, each with its state if resumed."""
    model, _ = adapted_network(config)
    parts = [model, torch.optim.AdamW(trainable(model), lr=0.02)]
    for part, state in zip(parts, states, strict=False):
        part.load_state_dict(state)
    parts.append(mmpeft.allocate(*parts, 60))
    if states:
        parts[-1].load_state_dict(states[-1])
    return parts


def through_a_file(states):
    file = io.BytesIO()
    torch.save(states, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
