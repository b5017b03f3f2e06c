// A region whose functions may use an instruction set that the build's flags do not have, for GCC and Clang.
#pragma once

#define FASTAGG_PRAGMA(text) _Pragma(#text)

#if defined(__clang__)
#define FASTAGG_BEGIN_TARGET(features) \
  FASTAGG_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define FASTAGG_END_TARGET FASTAGG_PRAGMA(clang attribute pop)
#else  // GCC's region ends with the file, for templates are instantiated there
#define FASTAGG_BEGIN_TARGET(features) FASTAGG_PRAGMA(GCC target(features))
#define FASTAGG_END_TARGET
#endif
