"""A vector of LANES numbers for numba: a row of a (rows, LANES) array, kept in registers.

LLVM vectorises a loop over several arrays only where it can tell that they do not overlap, and the
reverse sweep has too many for that. Here the vectors are in the code.
"""

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic, models, register_model

LANES = 16  # one AVX-512 register of float32, or two of AVX2
INDEX = ir.IntType(32)


class Lanes(types.Type):
    def __init__(self, real):
        self.real = real
        super().__init__(f"Lanes({real})")


@register_model(Lanes)
class LanesModel(models.PrimitiveModel):
    def __init__(self, manager, lanes):
        real = manager.lookup(lanes.real).get_value_type()
        super().__init__(manager, lanes, ir.VectorType(real, LANES))


def shuffle(builder, vector, order):
    return builder.shuffle_vector(
        vector, vector, ir.Constant(ir.VectorType(INDEX, len(order)), list(order))
    )


def row_pointer(context, builder, array_type, array, row):
    """Where a row begins. The array is contiguous, which the callers' types make sure of."""
    first = context.make_array(array_type)(context, builder, array).data
    address = builder.gep(first, [builder.mul(row, ir.Constant(row.type, LANES))])
    return builder.bitcast(address, ir.PointerType(ir.VectorType(first.type.pointee, LANES)))


def is_rows(array):
    return isinstance(array, types.Array) and array.layout == "C"


@intrinsic
def load(typing, array, row):
    """The row of a contiguous array whose last dimension is LANES; `row` counts from its start."""
    if not is_rows(array):
        return None

    def generate(context, builder, signature, arguments):
        pointer = row_pointer(context, builder, signature.args[0], *arguments)
        return builder.load(pointer, align=array.dtype.bitwidth // 8)

    return Lanes(array.dtype)(array, types.intp), generate


@intrinsic
def store(typing, array, row, vector):
    """Write a row, counted as in `load`."""
    if not is_rows(array):
        return None

    def generate(context, builder, signature, arguments):
        pointer = row_pointer(context, builder, signature.args[0], *arguments[:2])
        builder.store(arguments[2], pointer, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), generate


@intrinsic
def splat(typing, value):
    """The number in every lane."""

    def generate(context, builder, signature, arguments):
        undefined = ir.Constant(ir.VectorType(arguments[0].type, LANES), ir.Undefined)
        vector = builder.insert_element(undefined, arguments[0], ir.Constant(INDEX, 0))
        return shuffle(builder, vector, [0] * LANES)

    return Lanes(value)(value), generate


@intrinsic
def multiply(typing, x, y):
    def generate(context, builder, signature, arguments):
        return builder.fmul(*arguments)

    return x(x, y), generate


@intrinsic
def multiply_add(typing, x, y, z):
    """x y + z, fused where the processor can."""

    def generate(context, builder, signature, arguments):
        product = builder.fmul(*arguments[:2], flags=("contract",))
        return builder.fadd(product, arguments[2], flags=("contract",))

    return x(x, y, z), generate


@intrinsic
def total(typing, x):
    """The sum over the lanes, by halves."""

    def generate(context, builder, signature, arguments):
        (vector,) = arguments
        width = LANES
        while width > 1:
            width //= 2
            low = shuffle(builder, vector, range(width))
            high = shuffle(builder, vector, range(width, 2 * width))
            vector = builder.fadd(low, high)
        return builder.extract_element(vector, ir.Constant(INDEX, 0))

    return x.real(x), generate
