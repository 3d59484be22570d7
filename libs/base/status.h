// Error plumbing: absl::Status across our boundaries, MK_CHECK for our own bugs only.
#pragma once

#include <cstdio>
#include <cstdlib>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "libs/base/strings.h"

#define MK_CONCAT_INNER(a, b) a##b
#define MK_CONCAT(a, b) MK_CONCAT_INNER(a, b)

#define MK_RETURN_IF_ERROR(expr)                                            \
  do {                                                                      \
    if (absl::Status mk_status = (expr); !mk_status.ok()) return mk_status; \
  } while (false)

#define MK_ASSIGN_OR_RETURN(lhs, expr) MK_ASSIGN_OR_RETURN_INNER(MK_CONCAT(mk_or_, __LINE__), lhs, expr)
#define MK_ASSIGN_OR_RETURN_INNER(tmp, lhs, expr) \
  auto tmp = (expr);                              \
  if (!tmp.ok()) return std::move(tmp).status();  \
  lhs = *std::move(tmp)

#define MK_CHECK(condition)                                                                              \
  do {                                                                                                   \
    if (!(condition)) [[unlikely]] {                                                                     \
      std::fprintf(stderr, "internal error: %s:%d: %s does not hold\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                                      \
    }                                                                                                    \
  } while (false)

namespace minke {

// The same code, with `where` in front of the message.
inline absl::Status Annotate(const absl::Status& status, std::string_view where) {
  if (status.ok()) return status;
  return absl::Status(status.code(), StrCat(where, ": ", status.message()));
}

}  // namespace minke
