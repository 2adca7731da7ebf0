"""The yardstick: the training step of the same model in PyTorch, with the command line of ./train.

    torch.sh torch_speed.py CONFIG.cfg [key=value ...] [--mode eager|compiled|max-autotune] [--device cpu|cuda]
        [--turns]

Takes max_steps steps and prints one JSON object for each: step, loss, tokens_per_s. With --turns it prints `ready`
after a short step that compiles and warms up, and then takes a step for each line that it reads. Keys that only
concern a run's files and evaluations are ignored; a gate that is not written here is refused. Tokens are uniform random
numbers.

Shapes: B batch, T positions, C d_model, HQ / HK query / key-value heads, D head_dim, F d_ff, V vocabulary.
"""
import argparse
import json
import pathlib
import sys
import time

import torch
from torch import nn
from torch.nn import functional

from config import read_config


def gate_columns(keys):
    """Gate logits of one position."""
    gate = {name: keys.get(f"gate_{name}") for name in ("position", "type", "sharing", "form", "activation", "input")}
    if gate["position"] == "none":
        return 0
    written = {"sharing": "specific", "form": "multiplicative", "activation": "sigmoid", "input": "query"}
    if gate["position"] not in (None, "G1") or any(gate[name] not in (None, value) for name, value in written.items()):
        sys.exit(f"torch_speed.py: only sigmoid gates at G1 that multiply, or none, are written here, not {gate}")
    return int(keys["n_heads"]) * (1 if gate["type"] == "headwise" else int(keys["head_dim"]))


def linear(inputs, outputs):
    return nn.Linear(inputs, outputs, bias=False)


class RMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return functional.rms_norm(x, (x.size(-1),), self.weight, 1e-6)


def rotate(x, cos, sin):
    """RoPE in its "rotate half" form."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


class Attention(nn.Module):
    def __init__(self, C, HQ, HK, D, gate):
        super().__init__()
        self.HQ, self.HK, self.D = HQ, HK, D
        self.q, self.k, self.v, self.o = linear(C, HQ * D), linear(C, HK * D), linear(C, HK * D), linear(HQ * D, C)
        self.theta = linear(C, gate) if gate else None
        self.q_norm, self.k_norm = RMSNorm(D), RMSNorm(D)

    def forward(self, h, cos, sin):
        B, T, _ = h.shape
        q = rotate(self.q_norm(self.q(h).view(B, T, self.HQ, self.D)), cos, sin).transpose(1, 2)
        k = rotate(self.k_norm(self.k(h).view(B, T, self.HK, self.D)), cos, sin).transpose(1, 2)
        v = self.v(h).view(B, T, self.HK, self.D).transpose(1, 2)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
        if self.theta is not None:
            y = y * torch.sigmoid(self.theta(h)).view(B, T, self.HQ, -1)
        return self.o(y.reshape(B, T, -1))


class Layer(nn.Module):
    def __init__(self, C, HQ, HK, D, F, gate):
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(C), Attention(C, HQ, HK, D, gate)
        self.ffn_norm, self.act, self.up, self.down = RMSNorm(C), linear(C, F), linear(C, F), linear(F, C)

    def forward(self, x, cos, sin):
        x = x + self.attention(self.attention_norm(x), cos, sin)
        h = self.ffn_norm(x)
        return x + self.down(functional.silu(self.act(h)) * self.up(h))


class Model(nn.Module):
    def __init__(self, keys):
        super().__init__()
        names = ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff", "max_seq_len")
        V, C, L, HQ, HK, D, F, T = (int(keys[name]) for name in names)
        gate = gate_columns(keys)
        self.embedding, self.norm, self.head = nn.Embedding(V, C), RMSNorm(C), linear(C, V)
        self.layers = nn.ModuleList(Layer(C, HQ, HK, D, F, gate) for _ in range(L))
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
        angles = torch.arange(T).float()[:, None] * 10000.0 ** (-torch.arange(0, D, 2).float() / D)
        self.register_buffer("cos", torch.cat((angles.cos(), angles.cos()), -1)[:, None, :])
        self.register_buffer("sin", torch.cat((angles.sin(), angles.sin()), -1)[:, None, :])

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        return self.head(self.norm(x))


class Trainer:
    def __init__(self, keys, mode, device):
        self.device = device
        self.V, self.T, self.B = (int(keys[name]) for name in ("vocab_size", "max_seq_len", "batch_size"))
        self.amp = keys.get("use_amp") == "on"
        torch.manual_seed(0)
        self.model = model = Model(keys).to(device)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)

        def loss_of(x, y):
            return functional.cross_entropy(model(x).flatten(0, 1).float(), y.flatten())

        modes = {"compiled": "default", "max-autotune": "max-autotune"}
        self.loss = torch.compile(loss_of, mode=modes[mode]) if mode in modes else loss_of

    def step(self, accumulation):
        """One optimiser step: the loss of its last micro-batch, tokens per second."""
        begin = time.perf_counter()
        # Freed gradients save a CPU a pass over memory; in CUDA graphs (max-autotune) they have to stay where they are.
        self.optimizer.zero_grad(set_to_none=self.device == "cpu")
        for _ in range(accumulation):
            x = torch.randint(0, self.V, (self.B, self.T + 1), device=self.device)
            with torch.autocast(self.device, torch.bfloat16, enabled=self.amp):
                loss = self.loss(x[:, :-1], x[:, 1:])
            (loss / accumulation).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        value = loss.item()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return value, accumulation * self.B * self.T / (time.perf_counter() - begin)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=pathlib.Path)
    parser.add_argument("keys", nargs="*", metavar="key=value")
    parser.add_argument("--mode", choices=("eager", "compiled", "max-autotune"), default="eager")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--turns", action="store_true", help="a step for each line of standard input")
    arguments = parser.parse_intermixed_args()
    keys = read_config(arguments.config)
    for argument in arguments.keys:
        key, equals, value = argument.partition("=")
        if not equals:
            sys.exit(f"torch_speed.py: {argument} is not key=value")
        keys[key] = value
    if int(keys.get("threads", 0)) > 0:
        torch.set_num_threads(int(keys["threads"]))
    trainer = Trainer(keys, arguments.mode, arguments.device)
    if arguments.turns:
        trainer.step(accumulation=1)
        print("ready", flush=True)
    for step, _ in enumerate(sys.stdin if arguments.turns else range(int(keys["max_steps"])), 1):
        loss, speed = trainer.step(int(keys["gradient_accumulation_steps"]))
        print(json.dumps({"step": step, "loss": loss, "tokens_per_s": speed}), flush=True)


if __name__ == "__main__":
    main()
