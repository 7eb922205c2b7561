// Runs launches of the CPU library that come from the standard input, and writes what they leave in memory to the
// standard output. The first line out names the instruction sets, the best first. emulation.py is the other end.
//
// A launch is a line of words and then the bytes of its blocks of memory:
//     NAME THREADS; for each block its size; 0 or 1: whether there is a noise, and its fields; the numbers; the tensors
// Each list starts with its length. A pointer is a block's number (-1: NULL) and an offset of bytes. The answer is a
// line, the error code and whether the bytes around the blocks are untouched, and then the bytes of all blocks.
#include <stdlib.h>
#include <string.h>

#include <iostream>
#include <map>
#include <string>
#include <vector>

#include "../../csrc/cpu/dispatch.h"

namespace {

using Launcher = int (*)(const ulr_noise_spec*, const ulr_tensor*, const ulr_launch*);

constexpr size_t kGuard = 64;  // bytes before and after a block; it keeps a block's alignment
constexpr char kUntouched = 0x5a;

class Block {
  public:
    explicit Block(size_t size)
        : size_(size), memory_(static_cast<char*>(aligned_alloc(kGuard, (size / kGuard + 3) * kGuard))) {
        memset(memory_, kUntouched, size + 2 * kGuard);
    }
    Block(Block&& other) : size_(other.size_), memory_(other.memory_) { other.memory_ = nullptr; }
    ~Block() { free(memory_); }

    char* data() const { return memory_ + kGuard; }
    size_t size() const { return size_; }
    bool guards_untouched() const {
        for (size_t i = 0; i < kGuard; ++i)
            if (memory_[i] != kUntouched || data()[size_ + i] != kUntouched) return false;
        return true;
    }

  private:
    size_t size_;
    char* memory_;
};

template <typename T>
T next() {
    T value;
    std::cin >> value;
    return value;
}

void* pointer(const std::vector<Block>& blocks) {
    const auto block = next<int64_t>(), offset = next<int64_t>();
    return block < 0 ? nullptr : blocks[static_cast<size_t>(block)].data() + offset;
}

}  // namespace

#define ULR_DECLARE(set, name) \
    extern "C" int ulr_cpu_##name(const ulr_noise_spec*, const ulr_tensor*, const ulr_launch*);
#define ULR_ENTRY(set, name) {#name, ulr_cpu_##name},
ULR_CPU_LAUNCHERS(ULR_DECLARE, )
ULR_DECLARE(, philox4x32)
ULR_DECLARE(, fold_in)
extern "C" const char* ulr_cpu_available_isa(int i);

int main() {
    const std::map<std::string, Launcher> launchers{ULR_CPU_LAUNCHERS(ULR_ENTRY, ) ULR_ENTRY(, philox4x32)
                                                        ULR_ENTRY(, fold_in)};
    for (int i = 0; const char* isa = ulr_cpu_available_isa(i); ++i) std::cout << (i ? " " : "") << isa;
    std::cout << std::endl;
    for (std::string name; std::cin >> name;) {
        ulr_launch where{};
        where.threads = next<int32_t>();
        std::vector<Block> blocks;
        for (auto count = next<size_t>(); count; --count) blocks.emplace_back(next<size_t>());
        ulr_noise_spec spec{};
        const bool noise = next<int>();
        if (noise) {
            spec.key = static_cast<const int64_t*>(pointer(blocks));
            spec.sobol = static_cast<const uint32_t*>(pointer(blocks));
            std::cin >> spec.dist >> spec.antithetic >> spec.draw >> spec.row_offset >> spec.col_offset;
            std::cin >> spec.positions >> spec.width >> spec.hadamard;
        }
        std::vector<int64_t> numbers(next<size_t>());
        for (int64_t& number : numbers) number = next<int64_t>();
        std::vector<ulr_tensor> tensors(next<size_t>());
        for (ulr_tensor& tensor : tensors) {
            tensor.data = pointer(blocks);
            tensor.dtype = next<int32_t>();
            for (int64_t& size : tensor.size) size = next<int64_t>();
            for (int64_t& stride : tensor.stride) stride = next<int64_t>();
        }
        std::cin.get();  // the end of the line
        for (const Block& block : blocks) std::cin.read(block.data(), static_cast<std::streamsize>(block.size()));

        where.numbers = numbers.data();
        where.tensors = static_cast<int32_t>(tensors.size());
        const int code = launchers.at(name)(noise ? &spec : nullptr, tensors.data(), &where);
        bool untouched = true;
        for (const Block& block : blocks) untouched = untouched && block.guards_untouched();
        std::cout << code << " " << untouched << "\n";
        for (const Block& block : blocks) std::cout.write(block.data(), static_cast<std::streamsize>(block.size()));
        std::cout.flush();
    }
}
