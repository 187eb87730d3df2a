//! numpy arrays as slices: the right type, C-contiguous, aligned, and not written while they are read.

use numpy::prelude::*;
use numpy::{Element, PyArrayDyn, PyReadonlyArrayDyn, PyReadwriteArrayDyn};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;

pub type Input<'py, T> = PyReadonlyArrayDyn<'py, T>;
pub type Output<'py, T> = PyReadwriteArrayDyn<'py, T>;

/// An array to be read, with `dims` dimensions.
pub fn input<'py, T: Element>(
    name: &str,
    object: &Bound<'py, PyAny>,
    dims: usize,
) -> PyResult<Input<'py, T>> {
    let array = checked(name, object, dims)?;
    array.try_readonly().map_err(|error| PyValueError::new_err(format!("{name} can not be read: {error}")))
}

/// An array to be written, with `dims` dimensions.
pub fn output<'py, T: Element>(
    name: &str,
    object: &Bound<'py, PyAny>,
    dims: usize,
) -> PyResult<Output<'py, T>> {
    let array = checked(name, object, dims)?;
    array
        .try_readwrite()
        .map_err(|error| PyValueError::new_err(format!("{name} can not be written: {error}")))
}

/// A copy of a small array of any number of dimensions.
pub fn copied<T: Element + Copy>(name: &str, object: &Bound<PyAny>) -> PyResult<Vec<T>> {
    let array = typed::<T>(name, object)?;
    let array = array.try_readonly().map_err(|error| PyValueError::new_err(format!("{name}: {error}")))?;
    match array.as_slice() {
        Ok(slice) if array.is_c_contiguous() => Ok(slice.to_vec()),
        _ => Ok(array.as_array().iter().copied().collect()),
    }
}

fn typed<'a, 'py, T: Element>(
    name: &str,
    object: &'a Bound<'py, PyAny>,
) -> PyResult<&'a Bound<'py, PyArrayDyn<T>>> {
    object.cast::<PyArrayDyn<T>>().map_err(|_| {
        let wanted = numpy::dtype::<T>(object.py());
        let found = object.getattr("dtype").map_or_else(|_| object.get_type().to_string(), |d| d.to_string());
        PyTypeError::new_err(format!("{name} must be a numpy array of {wanted}, got {found}"))
    })
}

fn checked<'a, 'py, T: Element>(
    name: &str,
    object: &'a Bound<'py, PyAny>,
    dims: usize,
) -> PyResult<&'a Bound<'py, PyArrayDyn<T>>> {
    let array = typed::<T>(name, object)?;
    if array.ndim() != dims {
        let shape = array.shape();
        return Err(PyValueError::new_err(format!(
            "{name} must have {dims} dimensions, got shape {shape:?}"
        )));
    }
    if !array.is_c_contiguous() {
        return Err(PyValueError::new_err(format!(
            "{name} must be contiguous, got strides {:?}",
            array.strides()
        )));
    }
    Ok(array)
}

/// Where a contiguous array lies in memory.
pub trait Extent {
    fn extent(&self) -> (usize, usize);
}

impl<T: Element> Extent for Input<'_, T> {
    fn extent(&self) -> (usize, usize) {
        let begin = self.data() as usize;
        (begin, begin + self.len() * size_of::<T>())
    }
}

impl<T: Element> Extent for Output<'_, T> {
    fn extent(&self) -> (usize, usize) {
        let begin = self.data() as usize;
        (begin, begin + self.len() * size_of::<T>())
    }
}

/// Two tensors may be views of one memory, which numpy can not know: what is written must not be read as well.
pub fn apart(name: &str, written: &dyn Extent, others: &[&dyn Extent]) -> PyResult<()> {
    let (begin, end) = written.extent();
    let overlaps = |other: &&dyn Extent| {
        let (other_begin, other_end) = other.extent();
        begin.max(other_begin) < end.min(other_end)
    };
    if others.iter().any(overlaps) {
        return Err(PyValueError::new_err(format!("{name} must not share memory with another argument")));
    }
    Ok(())
}
