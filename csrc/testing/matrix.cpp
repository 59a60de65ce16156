// ldmatrix and mma. Fragment layouts: common/ptx.cuh and the PTX ISA.
#include "testing/matrix.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/ptx.cuh"

namespace flexvar::emulation {

namespace {

struct LoadOperands {
  int count;
  bool transposed;
  uint32_t* registers;
  const char* row;
};

struct ProductOperands {
  MatrixFormat format;
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

float decode(MatrixFormat format, uint32_t bits, int element) {
  const auto half = static_cast<uint16_t>(bits >> (16 * element));
  switch (format) {
    case MatrixFormat::half:
      return decode16<10>(half);
    case MatrixFormat::bfloat16:
      return decode16<7>(half);
    default:
      return std::bit_cast<float>(bits & 0xffffe000u);  // the hardware ignores the low 13 bits
  }
}

float toward_zero(double x) {
  const auto rounded = static_cast<float>(x);
  if (std::fabs(static_cast<double>(rounded)) <= std::fabs(x)) return rounded;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(rounded) - 1);  // one step smaller
}

// c + sum of a[i] b[i] as an A100 adds (Fasi, Higham, Mikaitis and Pranesh, "Numerical behavior of
// NVIDIA tensor cores", 2021): products exact, all terms truncated to one bit below the fp32
// significand of the largest, added exactly, the sum truncated to fp32.
template <int kTerms>
float dot_add(float c, const float* a, const float* b) {
  double terms[kTerms + 1];
  double largest = std::fabs(c);
  for (int i = 0; i < kTerms; ++i) {
    terms[i] = static_cast<double>(a[i]) * b[i];
    largest = std::max(largest, std::fabs(terms[i]));
  }
  terms[kTerms] = c;
  double total = 0;
  for (const double term : terms) total += term;
  if (!std::isfinite(total) || largest == 0) return static_cast<float>(total);
  // The power of two at or below the largest term, and 24 bits below it.
  const double power = std::bit_cast<double>(std::bit_cast<uint64_t>(largest) & (0x7ffull << 52));
  const double unit = power * 0x1p-24, per_unit = 1 / unit;
  int32_t units[kTerms + 1], sum = 0;
  for (int i = 0; i <= kTerms; ++i) units[i] = static_cast<int32_t>(terms[i] * per_unit);
  for (const int32_t term : units) sum += term;
  return toward_zero(sum * unit);
}

// The hardware adds dot products of kBlock terms, one after the other.
template <int kK, int kBlock>
void multiply(const WarpGroup& group) {
  constexpr int kElements = kK / 8;  // per register: 1 (tf32) or 2
  float a[16][kK], b[8][kK];
  const auto operands = [&](int lane) {
    return static_cast<const ProductOperands*>(group.lanes[lane]->operands);
  };
  const MatrixFormat format = operands(0)->format;
  for (int lane = 0; lane < 32; ++lane) {
    const ProductOperands& own = *operands(lane);
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < kElements; ++i) {
        const int k = kElements * t + i + half * (kK / 2);
        a[g][k] = decode(format, own.a[2 * half], i);
        a[g + 8][k] = decode(format, own.a[2 * half + 1], i);
        b[g][k] = decode(format, own.b[half], i);
      }
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* d = operands(lane)->d;
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + (i / 2) * 8, column = 2 * (lane % 4) + i % 2;
      for (int k = 0; k < kK; k += kBlock) d[i] = dot_add<kBlock>(d[i], a[row] + k, b[column] + k);
    }
  }
}

}  // namespace

void complete_matrix_product(const WarpGroup& group) {
  const auto& first = *static_cast<const ProductOperands*>(group.lanes[0]->operands);
  if (first.format == MatrixFormat::tf32) {
    multiply<8, 4>(group);
  } else {
    multiply<16, 8>(group);
  }
}

void complete_matrix_load(const WarpGroup& group, unsigned warp) {
  const auto operands = [&](int lane) {
    return static_cast<const LoadOperands*>(group.lanes[lane]->operands);
  };
  Fiber* const caller = current;
  const Site site{nullptr, group.where};
  for (int matrix = 0; matrix < operands(0)->count; ++matrix) {
    const char* rows[8];
    for (int row = 0; row < 8; ++row) {
      rows[row] = operands(matrix * 8 + row)->row;
      current = &block.fibers[warp * 32 + matrix * 8 + row];
      if (!in_shared(rows[row]) || reinterpret_cast<uintptr_t>(rows[row]) % 16 != 0) {
        fail("ldmatrix: a row must be 16-byte aligned in shared memory, " + to_string(group.where));
      }
    }
    // Each lane reads what it receives.
    for (int lane = 0; lane < 32; ++lane) {
      current = &block.fibers[warp * 32 + lane];
      const LoadOperands& own = *operands(lane);
      const int g = lane / 4, t = lane % 4;
      if (!own.transposed) {
        const char* source = rows[g] + 4 * t;
        check_read(source, 4, site);
        std::memcpy(&own.registers[matrix], source, 4);
        continue;
      }
      uint16_t elements[2];
      for (int i = 0; i < 2; ++i) {
        const char* source = rows[2 * t + i] + 2 * g;
        check_read(source, 2, site);
        std::memcpy(&elements[i], source, 2);
      }
      own.registers[matrix] = elements[0] | static_cast<uint32_t>(elements[1]) << 16;
    }
  }
  current = caller;
}

void matrix_product(MatrixFormat format, float* d, const uint32_t* a, const uint32_t* b,
                    Location where) {
  ProductOperands operands{format, d, a, b};
  WarpArguments arguments;
  arguments.operands = &operands;
  warp_collective(WarpOp::matrix_product, 0xffffffffu, arguments, where);
}

void matrix_load(int count, bool transposed, uint32_t* registers, const void* row, Location where) {
  LoadOperands operands{count, transposed, registers, static_cast<const char*>(row)};
  WarpArguments arguments;
  arguments.operands = &operands;
  warp_collective(WarpOp::matrix_load, 0xffffffffu, arguments, where);
}

}  // namespace flexvar::emulation
