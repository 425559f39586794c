// The part of XLA's foreign function interface (major version 0) that is used here: what a handler is called with, and whom
// it can call back. Every structure begins with its size, by which one sees whether the other side knows a field.
#pragma once
#include <cstddef>
#include <cstdint>

namespace normkit::xla {

struct Error;
struct Context;

struct Extension {
  size_t size;
  int type;
  Extension *next;
};
constexpr int kMetadata = 1;

struct Version {
  size_t size;
  Extension *extensions;
  int major, minor;
};
constexpr int kMajor = 0, kOldestMinor = 1, kNewestMinor = 3;  // between these nothing that is used here was moved

struct Metadata {
  size_t size;
  Version version;  // of the handler: its answer
};
struct MetadataExtension {
  Extension head;
  Metadata *metadata;
};

enum ElementType : int { kFloat16 = 10, kFloat32 = 11, kFloat64 = 12, kInt64 = 5, kBfloat16 = 16 };

struct Buffer {
  size_t size;
  Extension *extensions;
  int type;
  void *data;
  int64_t rank;
  int64_t *shape;
};

struct Buffers {
  size_t size;
  Extension *extensions;
  int64_t count;
  int *kinds;
  Buffer **items;
};
constexpr int kBuffer = 1;  // the only kind that there is

struct Text {
  const char *data;
  size_t size;
};
struct Scalar {
  int type;
  void *value;
};
struct Attributes {
  size_t size;
  Extension *extensions;
  int64_t count;
  int *kinds;
  Text **names;
  void **values;
};
constexpr int kScalar = 3;

struct ErrorArguments {
  size_t size;
  Extension *extensions;
  const char *message;
  int code;
};
constexpr int kInvalidArgument = 3, kExhausted = 8;

struct DestroyArguments {
  size_t size;
  Extension *extensions;
  Error *error;
};

struct ScheduleArguments {
  size_t size;
  Extension *extensions;
  Context *context;
  void (*task)(void *);
  void *data;
};

struct ThreadsArguments {
  size_t size;
  Extension *extensions;
  Context *context;
  int64_t *threads;
};

struct Api {
  size_t size;
  Extension *extensions;
  Version version;
  const void *internal;
  Error *(*create_error)(ErrorArguments *);
  void *message_of_error;
  void (*destroy_error)(DestroyArguments *);
  void *others[8];  // handlers, streams, types, states and device memory
  Error *(*schedule)(ScheduleArguments *);
  Error *(*threads)(ThreadsArguments *);
};

struct Frame {
  size_t size;
  Extension *extensions;
  const Api *api;
  Context *context;
  int stage;
  Buffers operands, results;
  Attributes attributes;
};
constexpr int kExecute = 3;

// Runs the kernel that the frame's attributes describe. Says in an error what does not fit; throws nothing.
Error *handle(Frame *frame);

}  // namespace normkit::xla
