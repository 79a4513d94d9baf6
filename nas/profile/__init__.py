"""Parameters, multiply-accumulates and activations of a model, by three counters under one convention.

The convention:

- One MAC is one multiply-accumulate of a matrix product or a convolution. Both products of attention count, all of
  their queries x keys whatever the mask (flex_attention's block mask too: what it skips is counted); products with
  padding count, as kernels do them. A complex one counts once.
- A product sums over an index: vecdot, einsum, multi_dot and matrix_power are products. One that sums over none
  (outer, ger, addr, kron, an einsum that keeps all indices) is element-wise and counts nothing, and so does a sum of
  element-wise products that is written as such (``(a * b).sum(-1)``, cosine_similarity).
- A Fourier transform of N points in all counts 2.5 N log2 N, half of that where one side is real; stft and istft are
  one transform a frame, cov and corrcoef one product with the transpose.
- Nothing else counts: no bias, norm, softmax, activation, pooling, resizing, embedding look-up, data movement
  (unfold and fold among it) or other element-wise work.
- Activations are the numbers that counted products write, attention scores among them.
- Parameters are counted once wherever they are shared; buffers are none.

What works hard and has no formula (grid_sample, cdist, bilinear, products of sparse matrices, decompositions and
inverses, hfft2 and its kin, functions that are called with functions such as cond and while_loop, kernels of other
libraries that nobody told us about with ``register_formula``) is named in ``uncounted``, never dropped silently. So is
``vmap`` by fvcore and thop, which see the sizes of one sample inside of it; torch counts what it does. What
torch.compile made is counted as the modules that it was made of. Weights that quantized modules keep packed are no
parameters.

The three look at a model at three levels: fvcore at the trace of what it calls, thop at its modules, torch's
FlopCounterMode at the operators that reach a device. None is right alone (fused attention is invisible to all three);
the modules ``by_fvcore``, ``by_thop`` and ``by_torch`` say what is theirs and what is ours. All count a copy on
tensors without data where the model runs so. One whose package is not installed is told of, and the others count.

>>> from torch import nn, empty
>>> compare(nn.Linear(3, 5), (empty(7, 3),)).counts["thop"].macs
105
"""

from __future__ import annotations

from nas.profile.comparison import COUNTERS, Comparison, Disagreement, compare, count
from nas.profile.default import Profile, profile
from nas.profile.formulas import register_formula
from nas.profile.tally import Count, inclusive

__all__ = [
    "COUNTERS",
    "Comparison",
    "Count",
    "Disagreement",
    "Profile",
    "compare",
    "count",
    "inclusive",
    "profile",
    "register_formula",
]
