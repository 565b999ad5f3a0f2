"""A head that stays in half precision while the network computes in float32.

The table of 130,528 x 4,096 that ChatGLM-6B shares between embeddings and head is 1.07 GB in fp16 and would be 2.14 GB
in fp32; and products in half precision are up to 200 times slower backward on a CPU. So the table stays as it is and
is widened a few rows at a time. (Embeddings need no class of their own: the network widens the rows it picked.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from pingjia.quant.product import stored_product


class HalfLinear(nn.Linear):
    """A linear whose result has the dtype of its input, whatever its weight is stored in.

    With equal dtypes it is exactly `nn.Linear`. Otherwise the weight is a constant: it gets no gradient, and whoever
    loads a network so must freeze it.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.weight.dtype == x.dtype:
            return F.linear(x, self.weight, self.bias)
        product = stored_product(x, self.weight)
        return product if self.bias is None else product + self.bias.to(x.dtype)
