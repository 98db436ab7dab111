// Makes a Python function of a launch: the members of its argument struct are the arguments, by position or by name.
// Names cost nothing: where they come in the members' order, each is one comparison of addresses.
#pragma once

#include <pybind11/pybind11.h>

#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "varkern.h"

namespace varkern::bindings {

// Names of the arguments, from the text of the members: "void* x; int64_t B, L;" has x, B and L. A nested struct makes
// several: the first is called as the member itself, the names of the others begin with that.
template <typename Args>
std::vector<std::string> names_of() {
  std::vector<std::string> names;
  if constexpr (!std::is_void_v<typename Args::Base>) names = names_of<typename Args::Base>();
  std::istringstream statements(Args::kMembers);
  for (std::string statement; std::getline(statements, statement, ';');) {
    const bool rows = statement.find("HeadRows ") != std::string::npos;
    std::istringstream declarators(statement);
    for (std::string name; std::getline(declarators, name, ',');) {
      name.erase(0, name.find_last_of(" *") + 1);
      names.push_back(name);
      if (!rows) continue;
      const std::vector<std::string> members = names_of<HeadRows>();
      for (size_t i = 1; i < members.size(); ++i) names.push_back(name + '_' + members[i]);
    }
  }
  return names;
}

struct Function {
  const char* name;
  std::vector<PyObject*> names;  // interned
  std::string doc;

  // What is given, in the order of the names, if need be in ordered; nullptr with an exception.
  PyObject* const* order(PyObject* const* given, Py_ssize_t positional, PyObject* keywords, PyObject** ordered) const {
    const Py_ssize_t count = Py_ssize_t(names.size()), all = positional + (keywords ? PyTuple_GET_SIZE(keywords) : 0);
    if (all != count) {
      PyErr_Format(PyExc_TypeError, "%s takes %zd arguments, not %zd; see help(%s)", name, count, all, name);
      return nullptr;
    }
    Py_ssize_t i = positional;
    while (i < count && PyTuple_GET_ITEM(keywords, i - positional) == names[size_t(i)]) ++i;
    if (i == count) return given;
    for (i = 0; i < count; ++i) ordered[i] = i < positional ? given[i] : nullptr;
    for (i = positional; i < count; ++i) {
      PyObject* keyword = PyTuple_GET_ITEM(keywords, i - positional);
      Py_ssize_t at = 0;
      while (at < count && PyUnicode_Compare(keyword, names[size_t(at)]) != 0) ++at;
      if (at == count || ordered[at]) {
        PyErr_Format(PyExc_TypeError, at == count ? "%s has no argument %R" : "%s is given %R twice", name, keyword);
        return nullptr;
      }
      ordered[at] = given[i];
    }
    return ordered;
  }
};

struct Values {
  PyObject* const* objects;
  Py_ssize_t wrong = -1;  // the first that is not what its member takes: an exception is set
};

// Becomes the number or the pointer that it initialises. It is no struct, so that a nested struct takes one a member.
struct Value {
  Values& values;
  size_t index;

  template <typename T, typename = std::enable_if_t<std::is_scalar_v<T>>>
  operator T() const {
    if (values.wrong >= 0) return T{};
    PyObject* object = values.objects[index];
    T result;
    if constexpr (std::is_same_v<T, bool>) {
      result = object == Py_True;
      if (!PyBool_Check(object)) PyErr_SetString(PyExc_TypeError, "give True or False");
    } else if constexpr (std::is_pointer_v<T>) {
      result = static_cast<T>(PyLong_AsVoidPtr(object));
    } else if constexpr (std::is_integral_v<T>) {
      const int64_t wide = PyLong_AsLongLong(object);
      result = T(wide);
      if (result != wide) PyErr_SetString(PyExc_OverflowError, "give an integer of 32 bits");
    } else {
      result = T(PyFloat_AsDouble(object));
    }
    if (PyErr_Occurred()) values.wrong = Py_ssize_t(index);
    return result;
  }
};

template <typename Args, size_t... I>
Args read(Values& values, std::index_sequence<I...>) {
  return Args{Value{values, I}...};
}

template <typename Args, typename Indices, typename = void>
struct Takes : std::false_type {};
template <typename Args, size_t... I>
struct Takes<Args, std::index_sequence<I...>, std::void_t<decltype(Args{(void(I), std::declval<Value>())...})>>
    : std::true_type {};

// How many values fill the struct.
template <typename Args, size_t kMost = 64>
constexpr size_t count_of() {
  if constexpr (Takes<Args, std::make_index_sequence<kMost>>::value) {
    return kMost;
  } else {
    return count_of<Args, kMost - 1>();
  }
}

template <typename Args>
Function make_function(const char* name, const char* structure, size_t count) {
  std::vector<std::string> names = names_of<Args>();
  if (names.size() < count) names.push_back("stream");
  Function function{name, {}, {}};
  std::string list;
  for (const std::string& n : names) {
    function.names.push_back(PyUnicode_InternFromString(n.c_str()));
    list += (list.empty() ? "" : ", ") + n;
  }
  if (names.size() != count) throw std::logic_error(std::string(structure) + " has other members than " + list);
  function.doc = std::string(name) + "(" + list + ")\n--\n\nShapes and dtypes: " + structure + " in csrc/ops.";
  return function;
}

// "group_norm: B is 2.5: 'float' object cannot be interpreted as an integer"
inline PyObject* refuse(const Function& function, const Values& values) {
  PyObject *type, *why, *trace;
  PyErr_Fetch(&type, &why, &trace);
  PyErr_Format(type, "%s: %U is %R: %S", function.name, function.names[size_t(values.wrong)],
               values.objects[values.wrong], why);
  Py_XDECREF(type), Py_XDECREF(why), Py_XDECREF(trace);
  return nullptr;
}

template <auto kLaunch, typename Launch = decltype(kLaunch)>
struct Binding;

// Stream is void* for a CUDA launch, else nothing.
template <auto kLaunch, typename Args, typename... Stream>
struct Binding<kLaunch, const char* (*)(const Args&, Stream...)> {
  typedef Args Arguments;
  static constexpr size_t kMembers = count_of<Args>(), kCount = kMembers + sizeof...(Stream);
  static inline Function function;

  static PyObject* call(PyObject*, PyObject* const* given, Py_ssize_t positional, PyObject* keywords) {
    PyObject* ordered[kCount];
    Values values{function.order(given, positional, keywords, ordered)};
    if (!values.objects) return nullptr;
    const Args args = read<Args>(values, std::make_index_sequence<kMembers>{});
    return run(values, args, static_cast<Stream>(Value{values, kMembers})...);
  }

  // The GIL is released while the launch runs, and the sentence it returns becomes a RuntimeError.
  static PyObject* run(const Values& values, const Args& args, Stream... stream) {
    if (values.wrong >= 0) return refuse(function, values);
    try {
      pybind11::gil_scoped_release nogil;
      if (const char* error = kLaunch(args, stream...)) throw std::runtime_error(error);
    } catch (const std::exception& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
      return nullptr;
    }
    Py_RETURN_NONE;
  }
};

// Adds a launch to the module under a name. structure: of its arguments, as the source calls it.
template <auto kLaunch>
void bind(pybind11::module_& m, const char* name, const char* structure) {
  typedef Binding<kLaunch> B;
  B::function = make_function<typename B::Arguments>(name, structure, B::kCount);
  static PyMethodDef method = {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&B::call)),
                               METH_FASTCALL | METH_KEYWORDS, B::function.doc.c_str()};
  const auto module_name = m.attr("__name__");
  m.add_object(name, pybind11::reinterpret_steal<pybind11::object>(
                         PyCFunction_NewEx(&method, nullptr, module_name.ptr())));
}

}  // namespace varkern::bindings
