// What the checks that the compiler inserts (-fsanitize=alignment, or =undefined) call; included by emulate.h. A GPU faults on
// a misaligned access where a CPU does not, so alignment is always checked. Own functions instead of libubsan: a broken rule
// becomes an error of the launch that names the line.
#pragma once

namespace emu {
struct SourceLocation {  // the first member of the data that the compiler passes
  const char* file;
  uint32_t line, column;
};
[[noreturn]] static void undefined(const SourceLocation* at, const char* what) {
  if (current < 0) {  // outside of kernels there is nothing to return to
    fprintf(stderr, "%s:%u: %s\n", at->file, at->line, what);
    __builtin_trap();
  }
  TQ_FAIL("%s at %s:%u", what, at->file, at->line);
}
}  // namespace emu

#define TQ_UNDEFINED_ONE(handler, what) \
  extern "C" __attribute__((used)) void __ubsan_handle_##handler(emu::SourceLocation* at) { emu::undefined(at, what); }
#define TQ_UNDEFINED(handler, what) TQ_UNDEFINED_ONE(handler, what) TQ_UNDEFINED_ONE(handler##_abort, what)
TQ_UNDEFINED(type_mismatch_v1, "misaligned or null pointer")
TQ_UNDEFINED(alignment_assumption, "misaligned pointer")
TQ_UNDEFINED(add_overflow, "integer overflow")
TQ_UNDEFINED(sub_overflow, "integer overflow")
TQ_UNDEFINED(mul_overflow, "integer overflow")
TQ_UNDEFINED(negate_overflow, "integer overflow")
TQ_UNDEFINED(divrem_overflow, "division by zero or overflow")
TQ_UNDEFINED(shift_out_of_bounds, "shift out of bounds")
TQ_UNDEFINED(out_of_bounds, "array index out of bounds")
TQ_UNDEFINED(pointer_overflow, "pointer overflow")
TQ_UNDEFINED(load_invalid_value, "invalid bool or enum")
TQ_UNDEFINED(nonnull_arg, "null argument")
TQ_UNDEFINED(vla_bound_not_positive, "array size not positive")
TQ_UNDEFINED(invalid_builtin, "invalid argument of a builtin")
TQ_UNDEFINED_ONE(builtin_unreachable, "unreachable code")
TQ_UNDEFINED_ONE(missing_return, "missing return")
#undef TQ_UNDEFINED
#undef TQ_UNDEFINED_ONE
