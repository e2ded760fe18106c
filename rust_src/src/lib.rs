//! CPU kernels of Bio-Inspired Nanochat: plain Rust functions and, with the `python` feature, the Python module
//! `bio_inspired_nanochat._rust`. The definitions are the PyTorch references in `bio_inspired_nanochat/kernels`.

pub mod presyn;

#[cfg(feature = "python")]
#[pyo3::pymodule]
mod _rust {
    use numpy::{PyArray1, PyArrayMethods, PyReadonlyArray1};
    use pyo3::prelude::*;

    use crate::presyn;

    /// The version that this extension was built as.
    #[pyfunction]
    fn version() -> &'static str {
        env!("CARGO_PKG_VERSION")
    }

    /// Drive of a terminal, elementwise: float32 [n] (contiguous) to float32 [n]. Runs without the interpreter lock.
    #[pyfunction]
    fn phi<'py>(
        py: Python<'py>,
        x: PyReadonlyArray1<'py, f32>,
    ) -> PyResult<Bound<'py, PyArray1<f32>>> {
        let input = x.as_slice()?;
        let output = PyArray1::<f32>::zeros(py, input.len(), false);
        let mut writable = output.readwrite();
        let target = writable.as_slice_mut()?;
        py.detach(|| presyn::phi_into(input, target));
        drop(writable);
        Ok(output)
    }
}
