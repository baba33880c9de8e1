"""Measure evaluation in merged weights over the plain network: time, memory, and merging itself.

    python projects/benchmark/merged_evaluation.py [--device cuda] [--out docs/benchmark/FILE.jsonl]

Each network and method has a process of its own. Passes of the plain network,
of the adapted one, and of the adapted one in ``mmpeft.merged`` alternate, and
the median ratio of the rounds counts. Memory is what the process holds in each
of these states, without pages of files: of the accelerator, or of the host.
"""

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
import time
from copy import deepcopy
from pathlib import Path
from statistics import median

import timm
import torch
import variants
from records import environment

import mmpeft

NETWORKS = {
    'ViT-B, 1 x 224': ('vit_base_patch16_224', (1, 3, 224, 224)),
    'ViT-B, 8 x 224': ('vit_base_patch16_224', (8, 3, 224, 224)),
    'ConvNeXt-V2-B, 1 x 160': ('convnextv2_base', (1, 3, 160, 160)),
    'ResNet-50, 1 x 320': ('resnet50', (1, 3, 320, 320)),
    'one token, 8 layers of width 2048': (None, (1, 1, 2048)),
}
METHODS = 'lora', 'flora', 'liera', 'dora'


def build(network, device):
    """A frozen network in evaluation mode, and an input."""
    name, size = NETWORKS[network]
    torch.manual_seed(0)
    if name is None:
        model = torch.nn.Sequential(*(torch.nn.Linear(size[-1], size[-1]) for _ in range(8)))
    else:
        model = timm.create_model(name)
    return model.eval().requires_grad_(False).to(device), torch.randn(size, device=device)


def adapt(model, method):
    """Adapters off their start, so that nothing is computed with zeros."""
    adapted = variants.VARIANTS[method](model, 16).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(1e-3 * torch.randn_like(parameter))
    return adapted


def seconds(model, x):
    """Of one forward pass, at least 0.1 seconds of which are measured."""
    wait = torch.cuda.synchronize if x.is_cuda else lambda: None
    count, start = 0, time.perf_counter()
    with torch.no_grad():
        while count < 3 or time.perf_counter() - start < 0.1:
            model(x)
            wait()
            count += 1
    return (time.perf_counter() - start) / count


def held(device):
    """Bytes of the accelerator's memory, or of the host's that are not pages of files."""
    if device == 'cuda':
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)  # gives back what the allocator holds of freed tensors
    status = Path('/proc/self/status').read_text()
    return 1024 * int(status.partition('RssAnon:')[2].split()[0])


def measure(network, method, device, rounds):
    """One record."""
    before = held(device)
    model, x = build(network, device)
    seconds(model, x)
    bytes_of = dict(plain=held(device) - before)
    adapt(model, method)
    seconds(model, x)
    bytes_of['attached'] = held(device) - before
    with tempfile.TemporaryDirectory(dir='.') as folder:
        start = time.perf_counter()
        with mmpeft.merged(model, offload=folder if device == 'cpu' else 'cpu'):
            there = time.perf_counter() - start
            seconds(model, x)
            bytes_of['merged'] = held(device) - before
            start = time.perf_counter()
        back = time.perf_counter() - start
        plain, _ = build(network, device)
        merged = mmpeft.merge(deepcopy(model), reversible=True)
        models = dict(plain=plain, attached=model, merged=merged)
        times = [{name: seconds(each, x) for name, each in models.items()} for _ in range(rounds)]
    ratios = {
        name: round(median(each[name] / each['plain'] for each in times), 3)
        for name in ('attached', 'merged')
    }
    return dict(
        network=network,
        method=method,
        plain_ms=round(1e3 * median(each['plain'] for each in times), 2),
        time=ratios,
        memory={k: round(v / bytes_of['plain'], 3) for k, v in bytes_of.items() if k != 'plain'},
        plain_mib=round(bytes_of['plain'] / 2**20),
        merge_s=round(there, 2),
        unmerge_s=round(back, 2),
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('--device', choices=['cpu', 'cuda'], default='cpu')
    add('--threads', type=int, default=2, help='on a CPU')
    add('--rounds', type=int, default=15)
    add('--networks', nargs='+', choices=NETWORKS, default=list(NETWORKS), metavar='NAME')
    add('--methods', nargs='+', choices=METHODS, default=METHODS)
    add('--out', type=Path, help='.jsonl, which grows')
    add('--alone', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.alone:
        record = measure(args.networks[0], args.methods[0], args.device, args.rounds)
        print(json.dumps(record))
        return
    where = environment(args.device)
    for network in args.networks:
        for method in args.methods:
            command = [sys.executable, __file__, '--alone', '--networks', network]
            command += ['--methods', method, '--device', args.device]
            command += ['--threads', str(args.threads), '--rounds', str(args.rounds)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            record = json.loads(done.stdout.splitlines()[-1])
            print(json.dumps(record), flush=True)
            if args.out:
                with args.out.open('a') as file:
                    file.write(json.dumps(record | dict(environment=where)) + '\n')


if __name__ == '__main__':
    main()
