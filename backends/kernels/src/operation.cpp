// The kernels as an operation of TensorFlow, for graphs that no compiler takes: see tensorflow.h. TensorFlow's C interface for that
// is looked up by name: nothing is linked, and no header of it is read.
#include <dlfcn.h>

#include <cstdint>
#include <string>
#include <vector>

#include "description.h"
#include "tensorflow.h"

namespace normkit {
namespace {

using namespace xla;

constexpr const char *kOperation = "NormkitCall";
constexpr int kInvalidArgument = 3, kResourceExhausted = 8;  // TF_Code
constexpr int kOk = 0;

// What TensorFlow's pointers are to: nothing that we know.
struct Status;
struct Tensor;
struct Context;
struct Construction;
struct KernelBuilder;
struct OpBuilder;
struct ShapeContext;

struct Interface {
  Status *(*new_status)();
  void (*delete_status)(Status *);
  void (*set_status)(Status *, int code, const char *message);
  int (*code)(const Status *);

  OpBuilder *(*new_op)(const char *name);
  void (*add_attribute)(OpBuilder *, const char *);
  void (*add_input)(OpBuilder *, const char *);
  void (*add_output)(OpBuilder *, const char *);
  void (*set_shapes)(OpBuilder *, void (*)(ShapeContext *, Status *));
  void (*unknown_shapes)(ShapeContext *, Status *);
  void (*register_op)(OpBuilder *, Status *);

  KernelBuilder *(*new_kernel)(const char *op, const char *device, void *(*create)(Construction *), void (*compute)(void *, Context *),
                               void (*destroy)(void *));
  void (*register_kernel)(const char *name, KernelBuilder *, Status *);

  void (*attribute_size)(Construction *, const char *, int32_t *list, int32_t *total, Status *);
  void (*string_attribute)(Construction *, const char *, char *value, size_t room, Status *);
  void (*integers_attribute)(Construction *, const char *, int64_t *values, int room, Status *);
  void (*cannot_construct)(Construction *, Status *);

  int (*inputs)(Context *);
  int (*outputs)(Context *);
  int (*output_type)(Context *, int);
  void (*get_input)(Context *, int, Tensor **, Status *);
  Tensor *(*allocate_output)(Context *, int, int type, const int64_t *lengths, int axes, size_t bytes, Status *);
  void (*cannot_compute)(Context *, Status *);

  void *(*data)(const Tensor *);
  int (*axes)(const Tensor *);
  int64_t (*length)(const Tensor *, int axis);
  int (*type)(const Tensor *);
  void (*delete_tensor)(Tensor *);

  bool find(void *library) {
    bool all = true;
    const auto at = [&](auto &function, const char *name) {
      all = (function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name))) && all;
    };
    at(new_status, "TF_NewStatus"), at(delete_status, "TF_DeleteStatus"), at(set_status, "TF_SetStatus"), at(code, "TF_GetCode");
    at(new_op, "TF_NewOpDefinitionBuilder"), at(add_attribute, "TF_OpDefinitionBuilderAddAttr");
    at(add_input, "TF_OpDefinitionBuilderAddInput"), at(add_output, "TF_OpDefinitionBuilderAddOutput");
    at(set_shapes, "TF_OpDefinitionBuilderSetShapeInferenceFunction"), at(unknown_shapes, "TF_ShapeInferenceContextSetUnknownShape");
    at(register_op, "TF_RegisterOpDefinition"), at(new_kernel, "TF_NewKernelBuilder"), at(register_kernel, "TF_RegisterKernelBuilder");
    at(attribute_size, "TF_OpKernelConstruction_GetAttrSize"), at(string_attribute, "TF_OpKernelConstruction_GetAttrString");
    at(integers_attribute, "TF_OpKernelConstruction_GetAttrInt64List"), at(cannot_construct, "TF_OpKernelConstruction_Failure");
    at(inputs, "TF_NumInputs"), at(outputs, "TF_NumOutputs"), at(output_type, "TF_ExpectedOutputDataType");
    at(get_input, "TF_GetInput"), at(allocate_output, "TF_AllocateOutput"), at(cannot_compute, "TF_OpKernelContext_Failure");
    at(data, "TF_TensorData"), at(axes, "TF_NumDims"), at(length, "TF_Dim"), at(type, "TF_TensorType");
    at(delete_tensor, "TF_DeleteTensor");
    return all;
  }
};

Interface tf;

class Said {
 public:
  Said() : status_(tf.new_status()) {}
  Said(const Said &) = delete;
  ~Said() { tf.delete_status(status_); }
  operator Status *() { return status_; }
  bool good() const { return tf.code(status_) == kOk; }
  void set(int code, const std::string &what) { tf.set_status(status_, code, what.c_str()); }

 private:
  Status *status_;
};

// TF_DataType
constexpr int kTypes[] = {1, 2, 19, 14};

// A tensor for the duration of a call.
struct Held {
  Tensor *tensor = nullptr;
  ~Held() {
    if (tensor) tf.delete_tensor(tensor);
  }
  int64_t count() const {
    int64_t n = 1;
    for (int d = 0; d < tf.axes(tensor); ++d) n *= tf.length(tensor, d);
    return n;
  }
};

// One node of a graph. Its attribute "text" is the call's description; "shapes" has of each result how many axes it has, and their
// lengths, of which -1 - a is that of x's axis a.
struct Node {
  std::string text;
  std::vector<int64_t> shapes;
  Description call;

  bool read(Construction *made, Said &said) {
    int32_t many = 0, size = 0;
    tf.attribute_size(made, "text", &many, &size, said);
    if (!said.good()) return false;
    text.resize(size_t(size));
    tf.string_attribute(made, "text", text.data(), text.size(), said);
    if (said.good()) tf.attribute_size(made, "shapes", &many, &size, said);
    if (!said.good()) return false;
    shapes.resize(size_t(many));
    tf.integers_attribute(made, "shapes", shapes.data(), many, said);
    if (said.good() && !call.read(text.data(), text.size())) said.set(kInvalidArgument, "normkit: what was asked for makes no sense: " + text);
    return said.good();
  }

  void compute(Context *context, Said &said) const {
    const auto wrong = [&](const char *what) { said.set(kInvalidArgument, std::string("normkit: ") + what + " in a call of " + text); };
    Held inputs[SLOTS];
    void *at[SLOTS]{};
    int64_t length = 1;
    const int given = tf.inputs(context);
    int i = 0;
    for (int s = 0; s < SLOTS; ++s) {
      if (!call.there(s) || call.is_result(s)) continue;
      if (i == given) return wrong("an array is missing");
      tf.get_input(context, i++, &inputs[s].tensor, said);
      if (!said.good()) return;
      const int64_t count = inputs[s].count();
      if (s == X && call.times) length = count / call.count(X, 1);
      if (count != call.count(s, length)) return wrong("an array has another size");
      if (tf.type(inputs[s].tensor) != kTypes[call.types[s]]) return wrong("an array has another dtype");
      at[s] = tf.data(inputs[s].tensor);
    }
    if (i != given) return wrong("there is an array too many");
    Held results[SLOTS];
    size_t next = 0;
    i = 0;
    for (int s = 0; s < SLOTS; ++s) {
      if (!call.there(s) || !call.is_result(s)) continue;
      if (i == tf.outputs(context)) return wrong("a result is missing");
      if (tf.output_type(context, i) != kTypes[call.types[s]]) return wrong("a result is to have another dtype");
      std::vector<int64_t> lengths;
      int64_t count = 1;
      for (int64_t left = next < shapes.size() ? shapes[next++] : 0; left > 0 && next < shapes.size(); --left) {
        int64_t n = shapes[next++];
        if (n < 0 && -1 - n >= tf.axes(inputs[X].tensor)) return wrong("a result is to have the length of an axis that there is not");
        lengths.push_back(n < 0 ? tf.length(inputs[X].tensor, int(-1 - n)) : n), count *= lengths.back();
      }
      if (count != call.count(s, length)) return wrong("a result is to have another size");
      const size_t bytes = size_t(count * size_of(call.types[s]));
      results[s].tensor = tf.allocate_output(context, i++, kTypes[call.types[s]], lengths.data(), int(lengths.size()), bytes, said);
      if (!said.good()) return;
      at[s] = tf.data(results[s].tensor);
    }
    if (i != tf.outputs(context)) return wrong("there is a result too many");
    if (const char *what = call.run(length, at)) said.set(kResourceExhausted, std::string("normkit: ") + what + " in a call of " + text);
  }
};

void *create(Construction *made) {
  Said said;
  Node *node = new Node;
  if (node->read(made, said)) return node;
  delete node;
  tf.cannot_construct(made, said);
  return nullptr;
}

void compute(void *node, Context *context) {
  Said said;
  static_cast<const Node *>(node)->compute(context, said);
  if (!said.good()) tf.cannot_compute(context, said);
}

void destroy(void *node) { delete static_cast<Node *>(node); }

}  // namespace

bool register_operation(const char *library) {
  static bool done = false;
  Interface found;
  void *const loaded = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
  if (!loaded || !found.find(loaded)) return false;
  if (done) return true;
  tf = found;
  Said said;
  OpBuilder *op = tf.new_op(kOperation);
  for (const char *attribute : {"Toperands: list(type)", "Tresults: list(type)", "text: string", "shapes: list(int)"})
    tf.add_attribute(op, attribute);
  tf.add_input(op, "operands: Toperands"), tf.add_output(op, "results: Tresults");
  tf.set_shapes(op, [](ShapeContext *context, Status *status) { tf.unknown_shapes(context, status); });
  tf.register_op(op, said);
  if (!said.good()) return false;
  tf.register_kernel(kOperation, tf.new_kernel(kOperation, "CPU", create, compute, destroy), said);
  return done = said.good();
}

}  // namespace normkit
