// What all kernels share.
#pragma once

namespace graphprune {

constexpr int kPanel = 64;  // tokens of a panel

}  // namespace graphprune
