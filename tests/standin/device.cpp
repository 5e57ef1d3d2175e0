// A device `standin`: memory of its own that no kernel of the CPU takes, computing as the CPU does.
//
// What mixes devices fails on it as it does on a GPU, and whatever makes the host wait for a value
// is counted. It is made of PyTorch's hooks for devices from outside (PrivateUse1).

#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>

namespace {

using Sizes = c10::SymIntArrayRef;
using Dtype = std::optional<at::ScalarType>;
using Layout = std::optional<at::Layout>;
using Place = std::optional<at::Device>;
using Pinned = std::optional<bool>;

constexpr auto KIND = c10::DeviceType::PrivateUse1;
const c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);

std::atomic<int64_t> waits{0};        // of the host, for values or for copies to end
thread_local bool computing = false;  // copies made to compute are no copies of the program's

struct Computing {
  bool before = computing;
  Computing() { computing = true; }
  ~Computing() { computing = before; }
};

// What PyTorch asks of a device

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes ? std::malloc(bytes) : nullptr;
    return {data, data, &std::free, c10::Device(KIND, 0)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};
Memory memory;
REGISTER_ALLOCATOR(KIND, &memory);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::Device here() const { return c10::Device(KIND, 0); }
  c10::Stream stream() const { return c10::Stream(c10::Stream::DEFAULT, here()); }
  c10::DeviceType type() const override { return KIND; }
  c10::Device exchangeDevice(c10::Device) const override { return here(); }
  c10::Device getDevice() const override { return here(); }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const override { return stream(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto grown = memory.allocate(bytes);
    std::memcpy(grown.mutable_get(), storage.data(), std::min(bytes, storage.nbytes()));
    storage.unsafeGetStorageImpl()->set_data_ptr(std::move(grown));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
};

// Tensors and copies

at::IntArrayRef ints(Sizes sizes) { return C10_AS_INTARRAYREF_SLOW(sizes); }

at::Tensor empty(Sizes size, Dtype dtype, Layout, Place, Pinned,
                 std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(ints(size), &memory, KEYS, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(Sizes size, Sizes stride, Dtype dtype, Layout, Place, Pinned) {
  return at::detail::empty_strided_generic(ints(size), ints(stride), &memory, KEYS,
                                           c10::dtype_or_default(dtype));
}

// The same memory as a tensor of the CPU.
at::Tensor seen(const at::Tensor& t) {
  if (t.device().type() != KIND) return t;
  auto storage = t.storage();
  auto* start = static_cast<char*>(storage.mutable_data());
  if (start != nullptr) start += t.storage_offset() * t.itemsize();
  return at::from_blob(start, t.sizes(), t.strides(), [storage](void*) {},
                       at::TensorOptions().dtype(t.scalar_type()));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  if (!computing && from.device() != to.device()) waits++;
  at::NoGradGuard no_grad;
  seen(to).copy_(seen(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar value_of(const at::Tensor& t) {
  if (!computing) waits++;
  return seen(t).item();
}

const at::Tensor& resize(const at::Tensor& t, Sizes size, std::optional<at::MemoryFormat>) {
  auto bytes =
      at::detail::computeStorageNbytesContiguous(ints(size), t.itemsize(), t.storage_offset());
  if (bytes > t.storage().nbytes())
    at::detail::getPrivateUse1Hooks().resizePrivateUse1Bytes(t.storage(), bytes);
  t.unsafeGetTensorImpl()->set_sizes_contiguous(ints(size));
  return t;
}

at::Tensor as_strided(const at::Tensor& t, Sizes size, Sizes stride,
                      std::optional<c10::SymInt> offset) {
  auto start = offset ? std::optional<int64_t>(offset->expect_int()) : std::nullopt;
  return at::native::as_strided_tensorimpl(t, ints(size), ints(stride), start);
}

at::Tensor reshape_alias(const at::Tensor& t, Sizes size, Sizes stride) {
  return at::native::_reshape_alias(t, ints(size), ints(stride));
}

at::Tensor view(const at::Tensor& t, Sizes size) { return at::native::view(t, ints(size)); }

at::Tensor& set_part(at::Tensor& t, at::Storage storage, c10::SymInt offset, Sizes size,
                     Sizes stride) {
  auto* impl = t.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  impl->set_sizes_and_strides(ints(size), ints(stride));
  impl->set_storage_offset(offset.expect_int());
  return t;
}

at::Tensor& set_whole(at::Tensor& t, at::Storage storage) {
  auto count = static_cast<int64_t>(storage.nbytes() / t.itemsize());
  return set_part(t, std::move(storage), 0, {count}, {1});
}

// Operations that PyTorch computes in another way on devices than on the CPU

at::Tensor convolution(const at::Tensor& x, const at::Tensor& weight,
                       const std::optional<at::Tensor>& bias, Sizes stride, Sizes padding,
                       Sizes dilation, bool transposed, Sizes output_padding, c10::SymInt groups) {
  Computing now;
  auto b = bias && bias->defined() ? std::optional<at::Tensor>(seen(*bias)) : std::nullopt;
  return at::convolution_symint(seen(x), seen(weight), b, stride, padding, dilation, transposed,
                                output_padding, groups)
      .to(x.device());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, Sizes stride,
    Sizes padding, Sizes dilation, bool transposed, Sizes output_padding, c10::SymInt groups,
    std::array<bool, 3> wanted) {
  Computing now;
  auto [dx, dw, db] = at::convolution_backward_symint(
      seen(grad), seen(x), seen(weight), weight.sym_sizes().slice(0, 1), stride, padding, dilation,
      transposed, output_padding, groups, wanted);
  auto back = [&](const at::Tensor& t) { return t.defined() ? t.to(x.device()) : t; };
  return {back(dx), back(dw), back(db)};
}

at::Tensor plus(const at::Tensor& gates, const std::optional<at::Tensor>& bias) {
  return bias && bias->defined() ? gates + *bias : gates;
}

// h' = n + z (h - n), with n = tanh(x_n + r h_n), r = s(x_r + h_r) and z = s(x_z + h_z).
std::tuple<at::Tensor, at::Tensor> gru_cell(const at::Tensor& of_input, const at::Tensor& of_hidden,
                                            const at::Tensor& h,
                                            const std::optional<at::Tensor>& input_bias,
                                            const std::optional<at::Tensor>& hidden_bias) {
  auto x = plus(of_input, input_bias).chunk(3, 1), y = plus(of_hidden, hidden_bias).chunk(3, 1);
  auto r = at::sigmoid(x[0] + y[0]), z = at::sigmoid(x[1] + y[1]), n = at::tanh(x[2] + r * y[2]);
  return {n + z * (h - n), at::cat({r, z, n, h, y[2]}, 1)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> gru_cell_backward(
    const at::Tensor& grad, const at::Tensor& kept, bool has_bias) {
  auto parts = kept.chunk(5, 1);
  auto &r = parts[0], &z = parts[1], &n = parts[2], &h = parts[3], &hidden = parts[4];
  auto dz = grad * (h - n) * z * (1 - z), dn = grad * (1 - z) * (1 - n * n);
  auto dr = dn * hidden * r * (1 - r);
  auto dx = at::cat({dr, dz, dn}, 1), dy = at::cat({dr, dz, dn * r}, 1);
  auto sum = [&](const at::Tensor& t) { return has_bias ? t.sum(0) : at::Tensor(); };
  return {dx, dy, grad * z, sum(dx), sum(dy)};
}

// Everything else, as the CPU does it. Tensors of another device are refused as CUDA refuses them:
// all but single numbers, and positions.
void fallback(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto name = op.schema().operator_name().name;
  const bool takes_positions = name == "aten::index" || name.rfind("aten::index_put", 0) == 0 ||
                               name.rfind("aten::_index_put", 0) == 0;
  auto check = [&](const at::Tensor& t) {
    TORCH_CHECK(!t.defined() || t.device().type() == KIND || t.dim() == 0 || takes_positions,
                "Expected all tensors to be on the same device, but ", name, " has one of ",
                t.sizes(), " on ", t.device());
  };
  for (const auto& value : torch::jit::last(*stack, op.schema().arguments().size())) {
    if (value.isTensor()) check(value.toTensor());
    if (value.isTensorList())
      for (const at::Tensor t : value.toTensorList()) check(t);
  }
  if (name == "aten::nonzero" || name == "aten::masked_select" || name.rfind("aten::_unique", 0) == 0)
    waits++;
  Computing now;
  at::native::cpu_fallback(op, stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", value_of);
  m.impl("resize_", resize);
  m.impl("as_strided", as_strided);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("view", view);
  m.impl("set_.source_Storage", set_whole);
  m.impl("set_.source_Storage_storage_offset", set_part);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
  m.impl("_thnn_fused_gru_cell", gru_cell);
  m.impl("_thnn_fused_gru_cell_backward", gru_cell_backward);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(mm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(bmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(addmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(baddbmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(conv1d, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(conv2d, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(scaled_dot_product_attention, lower_precision_fp)
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  m.def("waits", [] { return waits.load(); });
}
