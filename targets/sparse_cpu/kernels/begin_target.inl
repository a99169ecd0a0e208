// TARGET: instruction sets that the functions which follow may use; end_target.inl ends them.
#define GRAPHPRUNE_PRAGMA(text) _Pragma(#text)
#define GRAPHPRUNE_TEXT(...) GRAPHPRUNE_PRAGMA(__VA_ARGS__)
#if defined(__clang__)
GRAPHPRUNE_TEXT(clang attribute push(__attribute__((target(TARGET))), apply_to = function))
#else
_Pragma("GCC push_options")
GRAPHPRUNE_TEXT(GCC target(TARGET))
#endif
