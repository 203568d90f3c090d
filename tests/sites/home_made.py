"""Small models without transformers, whose blocks do what a test needs; and helpers to look at their sites."""

import torch
from torch import nn
from torch.nn import functional

WIDTH = 32
IDS = torch.tensor([[11, 54, 33, 78, 90], [60, 41, 22, 13, 5]])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        return self.o(functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), is_causal=True))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)

    def forward(self, x):
        return self.down(functional.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self, attention=Attention, mlp=Mlp):
        super().__init__()
        self.n1, self.attn, self.n2, self.mlp = nn.LayerNorm(WIDTH), attention(), nn.LayerNorm(WIDTH), mlp()

    def forward(self, x):
        x = x + self.attn(self.n1(x))
        return x + self.mlp(self.n2(x))


class Model(nn.Module):
    def __init__(self, block=Block, last=nn.LayerNorm):
        super().__init__()
        self.emb, self.layers = nn.Embedding(97, WIDTH), nn.ModuleList(block() for _ in range(3))
        self.last, self.head = last(WIDTH), nn.Linear(WIDTH, 97)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                nn.init.normal_(module.weight, 1, 0.1)

    def get_input_embeddings(self):
        return self.emb

    def forward(self, input_ids):
        x = self.emb(input_ids)
        for layer in self.layers:
            x = layer(x)
        return (self.head(self.last(x)),)


def places(sites, layer=0):
    """Return the tensor path of each kind of site in one block, or the reason why it is refused."""
    rows = [row for row in sites.rows() if layer in row.layers or not row.layers]
    return {row.name: row.tensor_path or row.reason for row in rows}


@torch.no_grad()
def run(model, sites, edits):
    """Run a model with edits at some sites, and return the values there before the edits."""
    seen, handles = {}, []
    for name, edit in edits.items():
        handles.append(
            sites[name].register(
                lambda x, name=name, edit=edit: edit(seen.setdefault(name, x.clone())), lambda: tuple(IDS.shape)
            )
        )
    model(input_ids=IDS)
    for handle in handles:
        handle.remove()
    return seen
