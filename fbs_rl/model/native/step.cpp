// A decoding step of a few rows on a CPU, in one call; its mathematics is that of fbs_rl/model/step_pass.py.
#include "walk.h"

#include <omp.h>

template <class T>
static void run(const ModelArguments& m, const StepArguments& s) {
  Room room(m, s.rows, s.threads, s.most_owed);
#pragma omp parallel num_threads(s.threads)
  {
    Walk<T> walk(m, s, room, omp_get_thread_num(), omp_get_num_threads());
    walk.walk();
  }
}

extern "C" void fbs_step_float(const ModelArguments* m, const StepArguments* s) { run<float>(*m, *s); }
extern "C" void fbs_step_bf16(const ModelArguments* m, const StepArguments* s) { run<bf16>(*m, *s); }

// Outputs of the language-model head that are made at a time, so that they are near when they are narrowed.
static const int SOME = 2048;

// y = x W^T + b of a few rows: the language-model head.
template <class T>
static void product(const Linear& w, const T* x, T* y, int rows, int outputs, int inputs, int threads) {
  Floats wide((long)rows * inputs);
  for (long i = 0; i < (long)rows * inputs; i++) wide[i] = widen(x[i]);
#pragma omp parallel num_threads(threads)
  {
    const int me = omp_get_thread_num(), many = omp_get_num_threads();
    const int first = (long)outputs * me / many, last = (long)outputs * (me + 1) / many;
    Inputs<T> taken;
    taken.take(wide.data(), rows, inputs);
    Floats made((long)rows * std::min(SOME, last - first));
    for (int from = first; from < last; from += SOME) {
      const int some = std::min(SOME, last - from);
      const Linear part = {(const T*)w.weight + (long)from * inputs, w.bias ? (const T*)w.bias + from : nullptr};
      multiply(part, taken, rows, made.data(), some, 0, some);
      for (int r = 0; r < rows; r++)
        for (int i = 0; i < some; i++) narrow(made[(long)r * some + i], y + (long)r * outputs + from + i);
    }
  }
}

extern "C" void fbs_product_float(
    const Linear* w, const float* x, float* y, int rows, int outputs, int inputs, int threads) {
  product(*w, x, y, rows, outputs, inputs, threads);
}
extern "C" void fbs_product_bf16(
    const Linear* w, const bf16* x, bf16* y, int rows, int outputs, int inputs, int threads) {
  product(*w, x, y, rows, outputs, inputs, threads);
}
