// How an operation's arguments are declared: once, as the members of a struct. csrc/bind.h makes the Python function
// of them: the members in their order are its arguments, by position or by name. Pointers are raw, strides are in
// elements, sizes are 64-bit.
#pragma once

#include <stdint.h>

namespace varkern {

enum DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kFloat64 = 3 };  // float64: attention alone

// struct Name with the members given, and their text, from which come the names.
#define VARKERN_ARGUMENTS(Name, ...)                     \
  struct Name {                                          \
    __VA_ARGS__                                          \
    typedef void Base;                                   \
    static constexpr const char* kMembers = #__VA_ARGS__; \
  };

// The same after the arguments of another struct.
#define VARKERN_MORE_ARGUMENTS(Name, Others, ...)        \
  struct Name : Others {                                 \
    __VA_ARGS__                                          \
    typedef Others Base;                                 \
    static constexpr const char* kMembers = #__VA_ARGS__; \
  };

}  // namespace varkern
