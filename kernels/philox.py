"""Philox4x32-10 in torch: a random word for every counter, the same one everywhere.

The generator is counter-based (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"):
a word depends on its key and counter alone. `tl.philox` gives the same words on a GPU.
"""

from torch import Tensor

LOW = 2**32 - 1

Words = int | Tensor


def philox(key: tuple[Words, Words], counter: tuple[Words, Words, Words, Words]) -> Words:
    """The first of the four words.

    key, counter: 32-bit words, as ints or int64 tensors that broadcast; so is what is returned.
    """
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # tensors wrap around, but hold all 64 bits
        c0, c1 = p1 >> 32 & LOW ^ c1 ^ k0, p1 & LOW
        c2, c3 = p0 >> 32 & LOW ^ c3 ^ k1, p0 & LOW
        k0, k1 = k0 + 0x9E3779B9 & LOW, k1 + 0xBB67AE85 & LOW
    return c0
