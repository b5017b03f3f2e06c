// The interpreter's lock, given up while native code works.
#pragma once
#include <pybind11/pybind11.h>

#include <chrono>
#include <thread>

namespace fastagg::bindings {

/// Gives the lock up for a scope. Unlike pybind11's own it survives the interpreter's end: to a daemon thread that asks
/// for the lock then, CPython up to 3.13 answers with pthread_exit, whose unwinding would meet a destructor and abort
/// the process. Such a thread waits here for the process to end, as CPython itself does from 3.14 on.
class ReleasedGil {
 public:
  ReleasedGil() : state_(PyEval_SaveThread()) {}
  ~ReleasedGil() {
    try {
      PyEval_RestoreThread(state_);
    } catch (...) {  // glibc's forced unwinding, which may not be ended
      for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
    }
  }
  ReleasedGil(const ReleasedGil&) = delete;
  ReleasedGil& operator=(const ReleasedGil&) = delete;

 private:
  PyThreadState* state_;
};

}  // namespace fastagg::bindings
