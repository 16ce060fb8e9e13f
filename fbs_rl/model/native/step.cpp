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

// y = x W^T + b of a few rows: the language-model head.
template <class T>
static void product(const Linear& w, const T* x, T* y, int rows, int outputs, int inputs, int threads) {
  Floats wide((long)rows * inputs), made((long)rows * outputs);
  for (long i = 0; i < (long)rows * inputs; i++) wide[i] = widen(x[i]);
#pragma omp parallel num_threads(threads)
  {
    const int me = omp_get_thread_num(), many = omp_get_num_threads();
    const int first = (long)outputs * me / many, last = (long)outputs * (me + 1) / many;
    Inputs<T> taken;
    taken.take(wide.data(), rows, inputs);
    multiply(w, taken, rows, made.data(), outputs, first, last);
    for (int r = 0; r < rows; r++)
      for (int i = first; i < last; i++) narrow(made[(long)r * outputs + i], y + (long)r * outputs + i);
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
