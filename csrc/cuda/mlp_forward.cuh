// A whole step of an MLP: the arguments of its kernel, and the forward of one layer by all blocks.
//
// The input of a layer has two parts: a row for each sample without noise (in the first layer, x), and a row for each
// copy of each sample in each pass with noise in an earlier layer, copy-major. If a noised layer's input is still
// without noise, the layer makes the copies: one product, then an output row for each copy.
#pragma once

#include "noise.cuh"
#include "row_loss.cuh"
#include "tile.cuh"

namespace ulr {

constexpr int kMlpThreads = 256, kForwardStages = 4;

__device__ __forceinline__ float activated(float y, Activation activation) {
    switch (activation) {
        case Activation::kRelu:
            return fmaxf(y, 0.0f);
        case Activation::kTanh:
            return tanhf(y);
        case Activation::kSigmoid:
            return 1.0f / (1.0f + expf(-y));
        default:
            return y > 0.0f ? 1.0f : 0.0f;
    }
}

// A layer's input, or the logits: rows `pitch` elements apart, so that octets of columns are whole and aligned.
template <typename T>
struct Level {
    T *clean, *noised;
    int64_t width, pitch;

    __host__ __device__ Matrix<T> matrix(T* data, int64_t rows) const {
        Matrix<T> result;
        result.data = data;
        result.rows = rows, result.cols = width;
        result.row_stride = pitch, result.col_stride = 1;
        result.whole = true;
        return result;
    }
};

template <typename T>
struct MlpLayer {
    Matrix<T> weight;
    PerFeature<T> bias;
    Buffer<T> grad_weight, grad_bias;
    float* partials;        // [splits, N * K + N], or NULL: the only split adds to the buffers
    int splits, unit_rows;  // of the gradient: parts of its blocks of rows, and their size
    int fan;                // blocks that share a tile's copies
    int tile;               // rows and features of a forward tile: 64 or 128
};

template <typename T>
struct MlpStep {
    ulr_noise_spec noise;  // its key: the first of all layers'
    Matrix<T> x;
    Target<T> target;
    const float* sigma;
    float* losses;        // [passes, copies, rows]
    float* loss_weights;  // [passes, copies, samples of a tile]
    float* partials;
    int64_t partials_count;
    int64_t rows, tile_samples;
    int copies, draws, layers;
    bool joint, has_clean;  // has_clean: rows without noise go through all layers
    Activation activation;
    Loss loss;
    float smoothing;
    Baseline baseline;
    Level<T> levels[kMostLayers + 1];
    MlpLayer<T> layer[kMostLayers];

    __device__ __forceinline__ int passes() const { return joint ? 1 : layers; }
    __device__ __forceinline__ bool makes_copies(int l) const { return !joint || l == 0; }
    __device__ __forceinline__ int64_t clean_rows(int l, int samples) const {
        return l == 0 || has_clean ? samples : 0;
    }
    __device__ __forceinline__ int64_t noised_rows(int l, int samples) const {
        return int64_t{joint ? l > 0 : l} * copies * samples;
    }
    // Layer l's input without noise, for the samples from `first` on.
    __device__ __forceinline__ Matrix<T> clean_input(int l, int64_t first, int samples) const {
        if (l > 0) return levels[l].matrix(levels[l].clean, samples);
        Matrix<T> rows_of_tile = x;
        rows_of_tile.data += first * x.row_stride;
        rows_of_tile.rows = samples;
        return rows_of_tile;
    }
    __device__ __forceinline__ ulr_noise_spec noise_of(int l) const {
        ulr_noise_spec own = noise;
        own.key += l;
        return own;
    }
};

constexpr int forward_bytes(int tile) {
    const int stages = kForwardStages * 64 * 2 * tile, sums = int{sizeof(float)} * tile * tile;
    return stages > sums ? stages : sums;
}

// A tile of a layer's output: tile x tile of the product, then noise and activation. All threads together; the table is
// filled for this layer.
template <typename T, Kind kind, int tile>
__device__ __forceinline__ void forward_tile(const MlpStep<T>& p, int l, const ulr_noise_spec& spec,
                                             const NoiseTable& table, int64_t item, int64_t first, int samples) {
    char* memory = dynamic_shared<char>();
    float* sums = dynamic_shared<float>();
    const MlpLayer<T>& layer = p.layer[l];
    const Level<T>& next = p.levels[l + 1];
    const int64_t features = layer.weight.rows, feature_tiles = (features + tile - 1) / tile;
    const int fans = p.makes_copies(l) ? layer.fan : 1;
    const int64_t clean_items = (p.clean_rows(l, samples) + tile - 1) / tile * fans * feature_tiles;
    const bool clean = item < clean_items;
    const int64_t first_feature = item % feature_tiles * tile,
                  rest = (clean ? item : item - clean_items) / feature_tiles;
    const int fan = clean ? static_cast<int>(rest % fans) : 0;
    const int64_t first_row = (clean ? rest / fans : rest) * tile;
    const Matrix<T> input =
        clean ? p.clean_input(l, first, samples) : p.levels[l].matrix(p.levels[l].noised, p.noised_rows(l, samples));
    {
        const int warp_row = threadIdx.x / 64 * (tile / 4), warp_col = threadIdx.x / 32 % 2 * (tile / 2);
        float acc[tile / 64][tile / 16][4] = {};
        tiled_product<tile, tile, kForwardStages, kMlpThreads>(acc, memory, input, first_row, layer.weight,
                                                               first_feature, warp_row, warp_col);
        store_sums<tile>(sums, acc, warp_row, warp_col);
    }
    __syncthreads();

    const Noise<kind> noise(spec, table);
    const int thread = opaque(static_cast<int>(threadIdx.x)), col = thread % (tile / 8) * 8;
    const int64_t feature = first_feature + col;
    const bool inside = feature < features, last = l == p.layers - 1;
    float sigma[8], bias[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        sigma[i] = p.sigma[l];
        bias[i] = layer.bias.data != nullptr && feature + i < features ? layer.bias[feature + i] : 0.0f;
    }
    const auto store = [&](T* rows, int64_t row, const float (&y)[8]) {
        if (!inside) return;
        float value[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            value[i] = to_float(from_float<T>(y[i]));  // an output is rounded before its activation is taken
            if (!last) value[i] = activated(value[i], p.activation);
        }
        store8(rows + row * next.pitch + feature, value);
    };
    constexpr int kRowsOfWarp = 256 / tile;
#pragma unroll 1
    for (int tile_row = thread / (tile / 8); tile_row < tile; tile_row += kMlpThreads / (tile / 8)) {
        if (first_row + tile_row / kRowsOfWarp * kRowsOfWarp >= input.rows) break;  // for a warp as a whole
        const int64_t row = first_row + tile_row;
        const bool counts = row < input.rows;
        float y[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) y[i] = sums[tile_row * tile + col + i] + bias[i];
        if (clean) {
            if (counts && fan == 0 && p.has_clean) store(next.clean, row, y);
            if (!p.makes_copies(l)) continue;
            Octet<kind> octet(noise, static_cast<uint32_t>(spec.row_offset + first + row), feature);
            const Noised<kind> noised(y, sigma);
            const int from = static_cast<int>(int64_t{p.draws} * fan / fans);
            const int to = static_cast<int>(int64_t{p.draws} * (fan + 1) / fans);
            const int64_t pass_rows = p.noised_rows(l, samples);  // rows of the earlier passes, if layer-wise
#pragma unroll 1
            for (int draw = from; draw < to; ++draw) {
                float plus[8], minus[8];
                noised.make(plus, minus, spec.antithetic != 0, octet, static_cast<uint32_t>(spec.draw + from),
                            draw - from);
                if (!counts) continue;
                store(next.noised, pass_rows + int64_t{draw} * samples + row, plus);
                if (spec.antithetic) store(next.noised, pass_rows + int64_t{p.draws + draw} * samples + row, minus);
            }
        } else {
            if (p.joint) {
                const int copy = static_cast<int>(row / samples), sample = static_cast<int>(row % samples);
                const bool mirrored = spec.antithetic && copy >= p.draws;
                Octet<kind> octet(noise, static_cast<uint32_t>(spec.row_offset + first + sample), feature);
                float eps[8];
                octet.make(eps, static_cast<uint32_t>(spec.draw + (mirrored ? copy - p.draws : copy)), 0,
                           StaticBool<false>{});
#pragma unroll
                for (int i = 0; i < 8; ++i) y[i] = fmaf(mirrored ? -sigma[i] : sigma[i], eps[i], y[i]);
            }
            if (counts) store(next.noised, row, y);
        }
    }
}

// Layer l's output for a tile of samples, its tiles in turn. A barrier of the grid must follow.
template <typename T, Kind kind>
__device__ __forceinline__ void forward_layer(const MlpStep<T>& p, int l, int64_t first, int samples) {
    __shared__ NoiseTable table;
    const ulr_noise_spec spec = p.noise_of(l);
    table.fill(spec, threadIdx.x, kMlpThreads);
    __syncthreads();
    const int tile = p.layer[l].tile;
    const auto tiles = [&](int64_t extent) { return (extent + tile - 1) / tile; };
    const int64_t row_tiles =
        tiles(p.clean_rows(l, samples)) * (p.makes_copies(l) ? p.layer[l].fan : 1) + tiles(p.noised_rows(l, samples));
    const int64_t items = row_tiles * tiles(p.layer[l].weight.rows);
    for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
        if (tile == 128) {
            forward_tile<T, kind, 128>(p, l, spec, table, item, first, samples);
        } else {
            forward_tile<T, kind, 64>(p, l, spec, table, item, first, samples);
        }
        __syncthreads();
    }
}

}  // namespace ulr
