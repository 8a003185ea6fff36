"""Exercise 12: the kernel of a decode step's attention, in Triton's interpreter."""

import re

import torch
import triton
from probe_10_kernel import interpreted, lowered


def surrounded(tensor):
    """A copy amid memory of its own: NaN, or zeros around whole numbers."""
    margin = tensor.numel() + 65_536
    fill = torch.nan if tensor.is_floating_point() else 0
    buffer = torch.full((tensor.numel() + 2 * margin,), fill, dtype=tensor.dtype)
    inside = buffer[margin:-margin].view(tensor.shape)
    inside.copy_(tensor)
    return inside


def times(events, kind: str, tensor):
    """How often the programs load or store each entry of a tensor."""
    addresses = [event["addresses"] for event in events if event["kind"] == kind]
    at = torch.cat([torch.zeros(0, dtype=torch.int64), *addresses]) - tensor.data_ptr()
    entries = at[(at >= 0) & (at < tensor.nbytes)] // tensor.itemsize
    return torch.bincount(entries, minlength=tensor.numel()).view(tensor.shape)


def decoded(query, keys, values, position, scale: float, window: int):
    """decode_kernel on query [A,H,G,E], keys [S,H,L,E], values [S,H,L,D] and position [A].

    out          [A,H,G,D], NaN where nothing is stored
    stores       how often each entry of `out` is stored
    key_loads    how often each entry of the keys is loaded
    value_loads  the same of the values
    elsewhere    how many loads and stores go to none of these tensors
    atomics      how many there are
    """
    from kernels import decode_attention

    (active, heads, group, size), (*_, length, width) = query.shape, values.shape
    out = torch.full((active, heads, group, width), torch.nan, dtype=query.dtype)
    read = [surrounded(x) for x in (query, keys, values, position)]
    out = surrounded(out)
    shape = decode_attention.launch_shape(group, size, width, query.dtype)
    with interpreted(module="kernels.decode_attention") as events:
        decode_attention.decode_kernel[(active, heads)](*read, out, scale, window, length, **shape)
    loads = [times(events, "load", tensor) for tensor in read]
    stores = times(events, "store", out)
    accesses = sum(len(one["addresses"]) for one in events if "addresses" in one)
    return {
        "out": out.clone(),
        "stores": stores,
        "key_loads": loads[1],
        "value_loads": loads[2],
        "elsewhere": accesses - sum(int(one.sum()) for one in (*loads, stores)),
        "atomics": sum(event["kind"] == "atomic" for event in events),
    }


def decode_front_end(group: int, key_size: int, value_size: int, dtype: str):
    """Put the kernel through the part of Triton's compiler that needs no GPU.

    Returns how many loops it has, and the precision of every matrix product.
    """
    from kernels import decode_attention

    kernel = decode_attention.decode_kernel
    kind = {"float32": "*fp32", "bfloat16": "*bf16"}[dtype]
    types = dict.fromkeys(("query", "keys", "values", "out"), kind) | {"position": "*i64"}
    types |= {"scale": "fp32", "window": "i32", "L": "i32"}
    shape = decode_attention.launch_shape(group, key_size, value_size, getattr(torch, dtype))
    text = lowered(kernel, types, shape)
    products = re.findall(r"tt\.dot (.*)", text)
    # The compiler does not write down the precision of exact products.
    names = [re.search(r"inputPrecision = (\w+)", one) for one in products]
    loops = text.count("scf.for") + text.count("scf.while")
    return loops, [name[1] if name else "ieee" for name in names]


def compiled_decode(query, keys, values, position, scale: float, window: int):
    """decode_attention, compiled, on a GPU."""
    from kernels.decode_attention import decode_attention

    if triton.knobs.runtime.interpret:
        raise RuntimeError("Triton is in its interpreter: set TRITON_INTERPRET=0 for this test")
    tensors = [one.to("cuda") for one in (query, keys, values, position)]
    return decode_attention(*tensors, scale, window).cpu()
