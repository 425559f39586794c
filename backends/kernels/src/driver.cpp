// A program for the sanitizers: every kernel on random sizes and alignments, in memory of exactly the size that it may touch,
// against plain loops in double; serially, on the pool, and from several threads at once. Exits with the number of failures.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "select.h"
#include "threads.h"
#include "vec.h"

namespace {

using namespace normkit;

std::atomic<int> failures{0};

// Bytes that start `shift` past an aligned address and end with the allocation.
struct Memory {
  char *block, *data;
  size_t size;
  Memory(size_t size, size_t shift) : size(size) {
    block = static_cast<char *>(malloc(size + shift));
    data = block + shift;
    memset(block, 0xff, size + shift);
  }
  ~Memory() { free(block); }
  Memory(const Memory &) = delete;
};

double read(const void *p, int type, int64_t i) {
  switch (type) {
    case F32: return get(static_cast<const float *>(p) + i);
    case F64: return get(static_cast<const double *>(p) + i);
    case F16: return get(static_cast<const half *>(p) + i);
    default: return get(static_cast<const bfloat *>(p) + i);
  }
}
void write(void *p, int type, int64_t i, double v) {
  switch (type) {
    case F32: return put(static_cast<float *>(p) + i, float(v));
    case F64: return put(static_cast<double *>(p) + i, v);
    case F16: return put(static_cast<half *>(p) + i, float(v));
    default: return put(static_cast<bfloat *>(p) + i, float(v));
  }
}

void one(std::mt19937 &random, const Table &table, Kind kind, int type, int64_t outer, int64_t groups, int64_t channels, int64_t inner) {
  const auto pick = [&](int n) { return int(random() % unsigned(n)); };
  std::normal_distribution<double> normal;
  Args a{};
  a.outer = outer, a.groups = kind == CHANNELS ? 1 : groups, a.channels = channels, a.inner = inner;
  a.eps = 1e-3, a.center = kind != ROWS || pick(3), a.xtype = type, a.wtype = a.btype = pick(2) ? type : int(F32);
  a.offset = pick(4) ? 0 : 1;
  const int64_t n = a.size(), params = a.groups * channels, sets = sets_of(kind, a);
  const int accumulate = type == F64 ? F64 : F32;
  const size_t shift = size_t(pick(5)) * size_t(pick(2) ? 1 : size_of(type));
  Memory x(size_t(n * size_of(type)), shift), dy(x.size, shift), y(x.size, shift), dx(x.size, shift);
  Memory weight(size_t(params * size_of(a.wtype)), 0), bias(size_t(params * size_of(a.btype)), 0);
  Memory dweight(weight.size, 0), dbias(bias.size, 0), stats(size_t(4 * sets * size_of(accumulate)), 0);
  for (int64_t i = 0; i < n; ++i) write(x.data, type, i, 1 + normal(random)), write(dy.data, type, i, normal(random));
  for (int64_t i = 0; i < params; ++i) write(weight.data, a.wtype, i, normal(random)), write(bias.data, a.btype, i, normal(random));
  const int64_t row = sets * size_of(accumulate);
  a.mean = stats.data, a.residue = stats.data + row, a.var = stats.data + 2 * row, a.rstd = stats.data + 3 * row;
  if (!a.center) a.mean = a.residue = nullptr;
  a.x = x.data, a.dy = dy.data, a.weight = weight.data, a.bias = bias.data;
  // Statistics brought along, where there is one for each parameter; then now and then only dx is wanted.
  const bool given = (kind == CHANNELS || (kind == COLUMNS && outer == 1 && channels == 1)) && pick(3) == 0;
  Memory given_mean(size_t(params * size_of(accumulate)), 0), given_var(given_mean.size, 0);
  Memory dmean(given_mean.size, 0), dvar(given_mean.size, 0);
  a.mtype = a.vtype = accumulate;
  if (given) a.given_mean = given_mean.data, a.given_var = given_var.data, a.mean = a.residue = a.var = a.rstd = nullptr;
  for (int64_t i = 0; i < params; ++i) {
    write(given_mean.data, accumulate, i, normal(random)), write(given_var.data, accumulate, i, 0.5 + std::fabs(normal(random)));
  }
  const bool sums = !given || pick(3);
  if (sums) a.dweight = dweight.data, a.dbias = dbias.data;
  if (sums && given) a.dmean = dmean.data, a.dvar = dvar.data;
  a.parallel = pick(2) ? parallel : serial, a.stream = pick(2);
  a.y = y.data;
  bool done = table.forward[kind](a);
  a.y = dx.data;
  done &= table.backward[kind](a);

  std::vector<double> mean(size_t(sets), 0), var(size_t(sets), 0), g1(size_t(sets), 0), g2(size_t(sets), 0);
  std::vector<double> dw(size_t(params), 0), db(size_t(params), 0);
  const double count = double(n) / double(sets);
  int64_t s, p;
  const auto w = [&](int64_t i) { return read(weight.data, a.wtype, i) + a.offset; };
  for (int64_t i = 0; i < n && a.center && !given; ++i) place(kind, a, i, s, p), mean[size_t(s)] += read(x.data, type, i) / count;
  for (int64_t i = 0; i < n && !given; ++i) {
    place(kind, a, i, s, p), var[size_t(s)] += std::pow(read(x.data, type, i) - mean[size_t(s)], 2) / count;
  }
  for (int64_t i = 0; i < params && given; ++i) {
    mean[size_t(i)] = read(given_mean.data, accumulate, i), var[size_t(i)] = read(given_var.data, accumulate, i);
  }
  const auto standard = [&](int64_t i) { return (read(x.data, type, i) - mean[size_t(s)]) / std::sqrt(var[size_t(s)] + a.eps); };
  for (int64_t i = 0; i < n; ++i) {
    place(kind, a, i, s, p);
    const double g = read(dy.data, type, i), v = standard(i);
    dw[size_t(p)] += g * v, db[size_t(p)] += g;
    if (!given) g1[size_t(s)] += g * w(p) / count, g2[size_t(s)] += g * w(p) * v / count;
  }
  double worst = 0;
  const auto compare = [&](double got, double want, int kept, double size) {
    const double unit = kept == F16 ? 0x1p-10 : kept == BF16 ? 0x1p-7 : 0x1p-20;
    const double error = std::fabs(got - want) / (unit * (1 + std::fabs(want) + size));
    worst = error <= worst ? worst : std::isnan(error) ? 1e9 : error;
  };
  for (int64_t i = 0; i < n; ++i) {
    place(kind, a, i, s, p);
    const double v = standard(i), rstd = 1 / std::sqrt(var[size_t(s)] + a.eps);
    compare(read(y.data, type, i), v * w(p) + read(bias.data, a.btype, p), type, std::fabs(v));
    compare(read(dx.data, type, i), rstd * (read(dy.data, type, i) * w(p) - (a.center ? g1[size_t(s)] : 0) - v * g2[size_t(s)]), type,
            8 * rstd);
  }
  for (int64_t i = 0; i < params && sums; ++i) {
    const double size = std::sqrt(double(n));
    compare(read(dweight.data, a.wtype, i), dw[size_t(i)], a.wtype, size);
    compare(read(dbias.data, a.btype, i), db[size_t(i)], a.btype, size);
    if (!given) continue;
    const double rstd = 1 / std::sqrt(var[size_t(i)] + a.eps), slope = w(i) * rstd;
    compare(read(dmean.data, accumulate, i), -slope * db[size_t(i)], accumulate, size * std::fabs(slope));
    compare(read(dvar.data, accumulate, i), -0.5 * slope * rstd * dw[size_t(i)], accumulate, size * std::fabs(slope) * rstd);
  }
  if (!done || worst > 4) {
    ++failures;
    printf("kind %d type %d sizes %lld %lld %lld %lld: %g\n", kind, type, (long long)outer, (long long)groups, (long long)channels,
           (long long)inner, worst);
  }
}

void sweep(const Table &table, unsigned seed, int rounds) {
  std::mt19937 random(seed);
  const int64_t sizes[] = {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 128};
  const auto size = [&] { return sizes[random() % (sizeof sizes / sizeof *sizes)]; };
  for (int round = 0; round < rounds; ++round) {
    const Kind kind = Kind(random() % 3);
    const int type = int(random() % 4);
    int64_t outer = size(), groups = size() % 9, channels = size(), inner = size();
    if (groups < 1) groups = 1;
    if (random() % 8 == 0) (random() % 2 ? inner : channels) = 4090 + int64_t(random() % 300), outer = outer % 4 + 1, groups = 1;
    if (kind == COLUMNS && random() % 4 == 0) outer = channels = 1, groups = 200 + int64_t(random() % 900), inner = 1 + inner % 256;
    if (kind == COLUMNS && random() % 12 == 0) {
      outer = channels = 1, groups = 20 + int64_t(random() % 500), inner = (1 << 19) / groups - int64_t(random() % 20);
    }
    if (kind == CHANNELS && random() % 8 == 0) {
      outer = 32 + int64_t(random() % 3), inner = 30 + int64_t(random() % 90), channels = 8192 / inner + 1 + int64_t(random() % 20);
    }
    if (kind == CHANNELS && random() % 12 == 0) {
      inner = 2 + int64_t(random() % 8), channels = 8 + int64_t(random() % 8), outer = (1 << 19) / (inner * channels), groups = 1;
    }
    if (outer * groups * channels * inner > (1 << 19)) continue;
    one(random, table, kind, type, outer, groups, channels, inner);
  }
}

}  // namespace

int main(int argc, char **argv) {
  const int rounds = argc > 1 ? atoi(argv[1]) : 300;
  limit_threads(3);
  for (const Isa *isa = instruction_sets(); isa->name; ++isa) {
    if (!isa->table) continue;
    sweep(*isa->table, 1, rounds);
    std::vector<std::thread> callers;
    for (unsigned k = 0; k < 3; ++k)
      callers.emplace_back([isa, k] {
        std::mt19937 random(k);
        for (int i = 0; i < 5; ++i) one(random, *isa->table, Kind(k), F32, 20, 3, 40, 50);
      });
    for (std::thread &caller : callers) caller.join();
    parallel(8, [](void *table, int64_t i) {  // calls from within a task
      std::mt19937 random(static_cast<unsigned>(i));
      one(random, *static_cast<const Table *>(table), Kind(i % 3), F32, 20, 3, 40, 50);
    }, const_cast<Table *>(isa->table));
    printf("%s: %d failures\n", isa->name, failures.load());
  }
  return failures < 100 ? failures.load() : 100;
}
