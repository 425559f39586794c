// See operators.h. The few functions of PyTorch's stable ABI that are needed, looked up by name: nothing is linked, and no header
// of PyTorch is read.
#include "operators.h"

#include <dlfcn.h>

#include <cstring>
#include <stdexcept>

#include "call.h"
#include "order.h"
#include "threads.h"

namespace normkit {
namespace {

using Handle = void *;   // of a tensor, a list or a library
using Value = uint64_t;  // on an operator's stack: a number's bits, a handle, or for an optional a pointer to a Value or null

constexpr uint64_t kVersion = uint64_t(2) << 56 | uint64_t(13) << 48;
constexpr int kDims = 16, kParameters = 5;

enum Layer : int64_t { LAYER, RMS, GROUP, INSTANCE, BATCH_GIVEN, BATCH };

struct Torch {
  int (*delete_value)(Value *);
  int (*delete_tensor)(Handle);
  int (*data)(Handle, void **);
  int (*dim)(Handle, int64_t *);
  int (*sizes)(Handle, int64_t **);
  int (*strides)(Handle, int64_t **);
  int (*dtype)(Handle, int32_t *);
  int (*device_type)(Handle, int32_t *);
  int (*device_index)(Handle, int32_t *);
  int (*empty)(int64_t, const int64_t *, const int64_t *, int32_t, int32_t, int32_t, Handle *);
  int (*new_list)(size_t, Handle *);
  int (*push_back)(Handle, Value);
  int (*dispatch)(const char *, const char *, Value *, uint64_t);
  const char *(*what)();
  int (*library)(const char *, const char *, const char *, uint32_t, Handle *);
  int (*implement)(Handle, const char *, void (*)(Value *, uint64_t, uint64_t), uint64_t);
  int32_t (*types[4])();  // in the order of Type
  int32_t (*cpu)();
} torch;

void require(int error) {
  if (error) throw std::runtime_error(torch.what());
}

struct Tensor {
  Handle handle = nullptr;
  void *data = nullptr;
  int type = NONE;
  int32_t dtype = 0, device_type = 0, device_index = 0;
  int64_t ndim = 0, count = 0, *sizes = nullptr, *strides = nullptr;

  // False where it is no floating-point memory of the host.
  bool open(Handle h) {
    handle = h;
    require(torch.dtype(h, &dtype)), require(torch.device_type(h, &device_type)), require(torch.device_index(h, &device_index));
    for (int t = 0; t < 4; ++t)
      if (dtype == torch.types[t]()) type = t;
    if (type == NONE || device_type != torch.cpu()) return false;
    require(torch.dim(h, &ndim)), require(torch.sizes(h, &sizes)), require(torch.strides(h, &strides));
    count = 1;
    for (int64_t d = 0; d < ndim; ++d) count *= sizes[d];
    return ndim < kDims && count && (require(torch.data(h, &data)), data);
  }
  bool row_major() const { return in_order(ndim, sizes, strides, 1, false); }
  bool channels_last() const { return in_order(ndim, sizes, strides, 1, true); }
  Tensor like() const { return made(ndim, sizes, strides, dtype); }
  Tensor made(int64_t dims, const int64_t *lengths, const int64_t *steps, int32_t kind) const {
    Tensor t;
    require(torch.empty(dims, lengths, steps, kind, device_type, device_index, &t.handle));
    require(torch.data(t.handle, &t.data));
    return t;
  }
  Tensor row_major_of(int64_t dims, const int64_t *lengths, int32_t kind) const {
    int64_t steps[kDims + 1], step = 1;
    for (int64_t d = dims; d-- > 0; step *= lengths[d]) steps[d] = step;
    return made(dims, lengths, steps, kind);
  }
};

// An operator's first arguments: x, weight, bias, mean, var.
struct Operands {
  Tensor all[kParameters];
  bool plain = true;

  explicit Operands(const Value *stack) {
    for (int i = 0; i < kParameters; ++i) {
      Handle handle = Handle(i ? (stack[i] ? *reinterpret_cast<Value *>(stack[i]) : 0) : stack[i]);
      if (handle && !all[i].open(handle)) plain = false;
    }
  }
  static void release(const Value *stack) {
    require(torch.delete_tensor(Handle(stack[0])));
    for (int i = 1; i < kParameters; ++i) {
      if (!stack[i]) continue;
      Value *value = reinterpret_cast<Value *>(stack[i]);
      require(torch.delete_tensor(Handle(*value))), require(torch.delete_value(value));
    }
  }
};

// What to run, as in backends/kernels/routes.py, and the shape of the statistics.
struct Plan {
  Args a{};
  int kind = ROWS;
  bool last = false;
  int64_t ndim = 0, moments[kDims + 2];

  // False where the arrays are not as the kernels have them.
  bool find(const Operands &operands, const Value *call) {
    const Tensor &x = operands.all[0];
    if (!operands.plain) return false;
    const int64_t layer = int64_t(call[0]), axes = int64_t(call[1]), groups = int64_t(call[2]);
    memcpy(&a.eps, call + 3, 8), memcpy(&a.offset, call + 4, 8);
    a.center = layer != RMS, a.xtype = x.type, a.x = x.data;
    last = !x.row_major();
    if (last && !x.channels_last()) return false;
    const bool right = layer == LAYER || layer == RMS        ? rows(x, axes)
                       : layer == GROUP || layer == INSTANCE ? grouped(x, axes, layer == GROUP ? groups : 0)
                                                             : batch(x, axes);
    if (!right) return false;
    const int64_t params = a.groups * a.channels;
    for (int i = 1; i < kParameters; ++i) {
      const Tensor &p = operands.all[i];
      if (p.handle && (p.count != params || !p.row_major())) return false;
    }
    a.weight = operands.all[1].data, a.bias = operands.all[2].data, a.given_mean = operands.all[3].data, a.given_var = operands.all[4].data;
    a.wtype = operands.all[1].type, a.btype = operands.all[2].type, a.mtype = operands.all[3].type, a.vtype = operands.all[4].type;
    return (layer == BATCH_GIVEN) == a.given() && a.given() == (a.given_var != nullptr);
  }
  int64_t sets() const { return kind == CHANNELS ? a.channels : a.outer * a.groups; }
  void place(void *stats) {
    char *at = static_cast<char *>(stats);
    const int64_t row = sets() * size_of(a.xtype == F64 ? F64 : F32);
    if (a.center) a.mean = at, a.residue = at + row, at += 2 * row;
    a.var = at, a.rstd = at + row;
  }
  void run(bool backward) {
    if (!launch(a, backward, kind, parallel)) throw std::bad_alloc();
  }

 private:
  void shape(std::initializer_list<int64_t> front, int64_t dims) {
    moments[0] = a.center ? 4 : 2, ndim = 1;
    for (int64_t n : front) moments[ndim++] = n;
    while (ndim < dims + 1) moments[ndim++] = 1;
  }
  bool rows(const Tensor &x, int64_t axes) {
    int64_t first = 0;
    while (first < x.ndim && !(axes >> first & 1)) ++first;
    if (last || axes != (int64_t(1) << x.ndim) - (int64_t(1) << first)) return false;
    a.outer = a.channels = a.groups = a.inner = 1;
    shape({}, x.ndim);
    for (int64_t d = 0; d < x.ndim; ++d) {
      (d < first ? a.outer : a.channels) *= x.sizes[d];
      if (d < first) moments[d + 1] = x.sizes[d];
    }
    return true;
  }
  bool grouped(const Tensor &x, int64_t axes, int64_t groups) {
    if (axes != 2) return false;
    kind = last ? COLUMNS : ROWS;
    a.outer = x.sizes[0], a.groups = groups ? groups : x.sizes[1], a.channels = x.sizes[1] / a.groups;
    a.inner = x.count / (x.sizes[0] * x.sizes[1]);
    shape({a.outer, a.groups}, x.ndim + (groups ? 1 : 0));
    return true;
  }
  bool batch(const Tensor &x, int64_t axes) {
    int64_t c = 0;
    while (c < x.ndim && axes >> c != 1) ++c;
    if (c == x.ndim || (last && c != 1)) return false;
    int64_t before = 1;
    for (int64_t d = 0; d < c; ++d) before *= x.sizes[d];
    const int64_t after = x.count / (before * x.sizes[c]);
    a.outer = a.groups = a.channels = 1;
    if (last || after == 1) kind = COLUMNS, a.groups = x.sizes[c], a.inner = before * after;
    else kind = CHANNELS, a.outer = before, a.channels = x.sizes[c], a.inner = after;
    shape({}, x.ndim);
    moments[c + 1] = x.sizes[c];
    return true;
  }
};

int32_t accumulated(const Tensor &x) { return torch.types[x.type == F64 ? F64 : F32](); }

// With statistics, for a gradient or a caller, or y alone.
template <bool save>
void forward(Value *stack, uint64_t, uint64_t) {
  const Operands operands(stack);
  const Tensor &x = operands.all[0];
  Plan plan;
  if (!plan.find(operands, stack + kParameters))
    return require(torch.dispatch(save ? "normkit::forward_of_any" : "normkit::y_of_any", "", stack, kVersion));
  const int64_t nothing = 0;
  const Tensor y = x.like();
  plan.a.y = y.data;
  Tensor stats;
  if (save && plan.a.given()) stats = x.row_major_of(1, &nothing, accumulated(x));
  if (save && !plan.a.given()) stats = x.row_major_of(plan.ndim, plan.moments, accumulated(x)), plan.place(stats.data);
  plan.run(false);
  Operands::release(stack);
  stack[0] = Value(y.handle);
  if (save) stack[1] = Value(stats.handle);
}

// After the operands: stats, dy, the call's five numbers, and a bit for each gradient that is wanted.
void backward(Value *stack, uint64_t, uint64_t) {
  const Operands operands(stack);
  const Tensor &x = operands.all[0];
  const Value *call = stack + kParameters + 2;
  const int64_t needs = int64_t(call[5]);
  Tensor stats, dy;
  Plan plan;
  const bool found = plan.find(operands, call), known = found && stats.open(Handle(stack[kParameters]));
  const bool right = found && dy.open(Handle(stack[kParameters + 1])) && dy.type == x.type && dy.count == x.count &&
                     (plan.last ? dy.channels_last() : dy.row_major());
  if (!right || (!plan.a.given() && (!known || !stats.row_major() || stats.count != plan.moments[0] * plan.sets())))
    return require(torch.dispatch("normkit::backward_of_any", "", stack, kVersion));
  plan.a.dy = dy.data;
  if (!plan.a.given()) plan.place(stats.data);
  void **const places[] = {&plan.a.y, &plan.a.dweight, &plan.a.dbias, &plan.a.dmean, &plan.a.dvar};
  Handle list;
  require(torch.new_list(kParameters, &list));
  for (int i = 0; i < kParameters; ++i) {
    const Tensor &like = operands.all[i];
    if (!(needs >> i & 1) || !like.handle) continue;
    const Tensor made = i ? x.row_major_of(like.ndim, like.sizes, like.dtype) : x.like();
    *places[i] = made.data;
    require(torch.push_back(list, Value(made.handle)));
  }
  plan.run(true);
  Operands::release(stack);
  for (int i = 0; i < 2; ++i) require(torch.delete_tensor(Handle(stack[kParameters + i])));
  stack[0] = Value(list);
}

}  // namespace

bool implement_operators(const char *path) {
  void *const loaded = dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
  if (!loaded) return false;
  bool all = true;
  const auto find = [&](auto &function, const char *name) {
    void *const symbol = dlsym(loaded, name);
    all = all && symbol;
    memcpy(&function, &symbol, sizeof symbol);
  };
  find(torch.delete_value, "torch_delete_stable_ivalue");
  find(torch.delete_tensor, "aoti_torch_delete_tensor_object");
  find(torch.data, "aoti_torch_get_data_ptr");
  find(torch.dim, "aoti_torch_get_dim");
  find(torch.sizes, "aoti_torch_get_sizes");
  find(torch.strides, "aoti_torch_get_strides");
  find(torch.dtype, "aoti_torch_get_dtype");
  find(torch.device_type, "aoti_torch_get_device_type");
  find(torch.device_index, "aoti_torch_get_device_index");
  find(torch.empty, "aoti_torch_empty_strided");
  find(torch.new_list, "torch_new_list_reserve_size");
  find(torch.push_back, "torch_list_push_back");
  find(torch.dispatch, "torch_call_dispatcher");
  find(torch.what, "torch_exception_get_what_without_backtrace");
  find(torch.library, "aoti_torch_library_init_impl");
  find(torch.implement, "torch_library_impl");
  find(torch.types[F32], "aoti_torch_dtype_float32");
  find(torch.types[F64], "aoti_torch_dtype_float64");
  find(torch.types[F16], "aoti_torch_dtype_float16");
  find(torch.types[BF16], "aoti_torch_dtype_bfloat16");
  find(torch.cpu, "aoti_torch_device_type_cpu");
  Handle library;  // for as long as the process lives
  return all && !torch.library("normkit", "CPU", "operators.cpp", 0, &library) && !torch.implement(library, "forward", forward<true>, kVersion) &&
         !torch.implement(library, "y", forward<false>, kVersion) &&         !torch.implement(library, "backward", backward, kVersion);
}

}  // namespace normkit
