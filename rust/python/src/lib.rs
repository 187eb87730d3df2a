//! `headkv._rust`: takes numpy views of torch's memory, checks them, and calls headkv-core without the interpreter lock.
//!
//! float32 pools come as float32 arrays, bfloat16 and float16 ones as uint16 arrays of their bits, 8-bit codes as int8 ones,
//! pairs of 4-bit codes as uint8 ones. What is only moved comes as uint8 arrays of its bytes.

mod arrays;

use headkv_core::{
    Code, Element, Entries, Error, Float, Floats, HalfBitsSliceExt, Isa, Layer, Options, Pools, Queries,
    Residual, Rows, Sums, bf16, f16,
};
use numpy::prelude::*;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;

use crate::arrays::{Extent, Input, Output, apart, copied, input, output};

/// The arrays of a ragged layer: any object with these attributes.
#[derive(FromPyObject)]
struct LayerArrays<'py> {
    keys: Bound<'py, PyAny>,
    values: Bound<'py, PyAny>,
    positions: Bound<'py, PyAny>,
    start: Bound<'py, PyAny>,
    length: Bound<'py, PyAny>,
    capacity: Bound<'py, PyAny>,
    sinks: Bound<'py, PyAny>,
    recent: Bound<'py, PyAny>,
    key_sum: Option<Bound<'py, PyAny>>,
    value_sum: Option<Bound<'py, PyAny>>,
    count: Option<Bound<'py, PyAny>>,
    scales: Option<Bound<'py, PyAny>>,
    residual_keys: Option<Bound<'py, PyAny>>,
    residual_values: Option<Bound<'py, PyAny>>,
    residual_count: Option<Bound<'py, PyAny>>,
}

/// The storage of a layer, read or written: any object with these attributes, bytes but for the positions.
#[derive(FromPyObject)]
struct PoolArrays<'py> {
    keys: Bound<'py, PyAny>,
    values: Bound<'py, PyAny>,
    positions: Bound<'py, PyAny>,
    scales: Option<Bound<'py, PyAny>>,
}

/// Copies of the numbers of each row, so that what was checked is what is used, whatever other threads do meanwhile.
struct RowNumbers {
    start: Vec<i64>,
    length: Vec<i64>,
    capacity: Vec<i64>,
}

impl RowNumbers {
    fn new(start: &Bound<PyAny>, length: &Bound<PyAny>, capacity: &Bound<PyAny>) -> PyResult<Self> {
        Ok(Self {
            start: copied("start", start)?,
            length: copied("length", length)?,
            capacity: copied("capacity", capacity)?,
        })
    }

    fn rows(&self) -> Rows<'_> {
        Rows { start: &self.start, length: &self.length, capacity: &self.capacity }
    }
}

/// Attention of queries over a ragged layer, written to `out`.
#[pyfunction]
#[pyo3(signature = (q, query_positions, layer, dtype, out, *, scale, sliding_window=None, softcap=None, sink_logits=None, threads=1, isa=None))]
#[allow(clippy::too_many_arguments)]
fn attend<'py>(
    py: Python<'py>,
    q: &Bound<'py, PyAny>,
    query_positions: &Bound<'py, PyAny>,
    layer: LayerArrays<'py>,
    dtype: &str,
    out: &Bound<'py, PyAny>,
    scale: f32,
    sliding_window: Option<i64>,
    softcap: Option<f32>,
    sink_logits: Option<&Bound<'py, PyAny>>,
    threads: usize,
    isa: Option<&str>,
) -> PyResult<()> {
    let isa = named_isa(isa)?;
    let options = Options { scale, sliding_window, softcap, threads, isa };
    let call = Attend { options, q, query_positions, sink_logits, out, dtype };
    match dtype {
        _ if is::<u8>(&layer.keys) => call.run::<u8, u8, u8, u8>(py, &layer, |x| x, |x| x),
        _ if is::<i8>(&layer.keys) && is::<u8>(&layer.values) => {
            call.run::<i8, i8, u8, u8>(py, &layer, |x| x, |x| x)
        }
        _ if is::<i8>(&layer.keys) => call.run::<i8, i8, i8, i8>(py, &layer, |x| x, |x| x),
        "float32" => call.run::<f32, f32, f32, f32>(py, &layer, |x| x, |x| x),
        "bfloat16" => call.run::<u16, bf16, u16, bf16>(py, &layer, as_bf16, as_bf16),
        "float16" => call.run::<u16, f16, u16, f16>(py, &layer, as_f16, as_f16),
        other => Err(wrong_dtype(other)),
    }
}

struct Attend<'a, 'py> {
    options: Options,
    q: &'a Bound<'py, PyAny>,
    query_positions: &'a Bound<'py, PyAny>,
    sink_logits: Option<&'a Bound<'py, PyAny>>,
    out: &'a Bound<'py, PyAny>,
    /// Of the entries, or of their scales.
    dtype: &'a str,
}

impl Attend<'_, '_> {
    /// `SK` and `SV` are what numpy holds of keys and values, `K` and `V` what that means.
    fn run<SK: numpy::Element, K: Element, SV: numpy::Element, V: Element>(
        &self,
        py: Python<'_>,
        arrays: &LayerArrays<'_>,
        meant_keys: fn(&[SK]) -> &[K],
        meant_values: fn(&[SV]) -> &[V],
    ) -> PyResult<()> {
        let q: Input<f32> = input("q", self.q, 4)?;
        let query_positions: Vec<i64> = copied("query_positions", self.query_positions)?;
        let sink_logits: Option<Vec<f32>> =
            self.sink_logits.map(|sinks| copied("sink_logits", sinks)).transpose()?;
        let keys: Input<SK> = input("keys", &arrays.keys, 2)?;
        let values: Input<SV> = input("values", &arrays.values, 2)?;
        let positions: Input<i32> = input("positions", &arrays.positions, 1)?;
        let rows = RowNumbers::new(&arrays.start, &arrays.length, &arrays.capacity)?;
        let sinks: Vec<i64> = copied("sinks", &arrays.sinks)?;
        let recent: Vec<i64> = copied("recent", &arrays.recent)?;
        let sums: Option<(Input<f32>, Input<f32>, Vec<i64>)> =
            match (&arrays.key_sum, &arrays.value_sum, &arrays.count) {
                (Some(key), Some(value), Some(count)) => {
                    Some((input("key_sum", key, 2)?, input("value_sum", value, 2)?, copied("count", count)?))
                }
                (None, None, None) => None,
                _ => {
                    return Err(PyValueError::new_err("key_sum, value_sum and count must be given together"));
                }
            };
        if (is::<i8>(&arrays.keys) || is::<u8>(&arrays.keys)) != arrays.scales.is_some() {
            return Err(PyValueError::new_err(
                "scales must be given with int8 or uint8 keys, and with no others",
            ));
        }
        let numbers = |name, array, dims| Numbers::new(name, array, dims, self.dtype);
        let scales = arrays.scales.as_ref().map(|scales| numbers("scales", scales, 2)).transpose()?;
        let held: Option<(Numbers, Numbers, Vec<i64>)> =
            match (&arrays.residual_keys, &arrays.residual_values, &arrays.residual_count) {
                (Some(keys), Some(values), Some(count)) => Some((
                    numbers("residual_keys", keys, 3)?,
                    numbers("residual_values", values, 3)?,
                    copied("residual_count", count)?,
                )),
                (None, None, None) => None,
                _ => {
                    return Err(PyValueError::new_err(
                        "residual_keys, residual_values and residual_count must be given together",
                    ));
                }
            };
        let mut out: Output<f32> = output("out", self.out, 4)?;
        let shape = q.shape();
        if out.shape() != shape {
            return Err(PyValueError::new_err(format!(
                "out must have the shape of q {shape:?}, got {:?}",
                out.shape()
            )));
        }
        for (name, width) in
            [("keys", keys.shape()[1] * K::CHANNELS), ("values", values.shape()[1] * V::CHANNELS)]
        {
            if width != shape[3] {
                return Err(PyValueError::new_err(format!(
                    "{name} must have the width of q {}, got {width}",
                    shape[3]
                )));
            }
        }
        let mut read: Vec<&dyn Extent> = vec![&q, &keys, &values, &positions];
        if let Some((keys, values, _)) = &held {
            if keys.shape() != values.shape() || keys.shape()[2] != shape[3] {
                return Err(PyValueError::new_err(format!(
                    "residual_keys and residual_values must have shape [rows, R, {}], got {:?} and {:?}",
                    shape[3],
                    keys.shape(),
                    values.shape()
                )));
            }
            read.extend([keys.extent(), values.extent()]);
        }
        if let Some((key, value, _)) = &sums {
            read.extend([key as &dyn Extent, value]);
        }
        read.extend(scales.as_ref().map(Numbers::extent));
        apart("out", &out, &read)?;

        let queries = Queries {
            batch: shape[0],
            heads: shape[1],
            steps: shape[2],
            data: q.as_slice()?,
            positions: &query_positions,
            sink_logits: sink_logits.as_deref(),
        };
        let layer = Layer {
            head_dim: shape[3],
            keys: meant_keys(keys.as_slice()?),
            values: meant_values(values.as_slice()?),
            positions: positions.as_slice()?,
            rows: rows.rows(),
            sinks: &sinks,
            recent: &recent,
            sums: match &sums {
                Some((key, value, count)) => {
                    Some(Sums { key: key.as_slice()?, value: value.as_slice()?, count })
                }
                None => None,
            },
            scales: scales.as_ref().map(Numbers::floats).transpose()?,
            residual: match &held {
                Some((keys, values, count)) => Some(Residual {
                    size: keys.shape()[1],
                    keys: keys.floats()?,
                    values: values.floats()?,
                    count,
                }),
                None => None,
            },
        };
        let (options, out) = (self.options, out.as_slice_mut()?);
        py.detach(|| headkv_core::attend(&layer, &queries, &options, out)).map_err(value_error)
    }
}

/// An array of the dtype in which vectors come.
enum Numbers<'py> {
    F32(Input<'py, f32>),
    Bf16(Input<'py, u16>),
    F16(Input<'py, u16>),
}

impl<'py> Numbers<'py> {
    fn new(name: &str, array: &Bound<'py, PyAny>, dims: usize, dtype: &str) -> PyResult<Self> {
        Ok(match dtype {
            "float32" => Numbers::F32(input(name, array, dims)?),
            "bfloat16" => Numbers::Bf16(input(name, array, dims)?),
            "float16" => Numbers::F16(input(name, array, dims)?),
            other => return Err(wrong_dtype(other)),
        })
    }

    fn shape(&self) -> &[usize] {
        match self {
            Numbers::F32(array) => array.shape(),
            Numbers::Bf16(array) | Numbers::F16(array) => array.shape(),
        }
    }

    fn extent(&self) -> &dyn Extent {
        match self {
            Numbers::F32(array) => array,
            Numbers::Bf16(array) | Numbers::F16(array) => array,
        }
    }

    fn floats(&self) -> PyResult<Floats<'_>> {
        Ok(match self {
            Numbers::F32(array) => Floats::F32(array.as_slice()?),
            Numbers::Bf16(array) => Floats::Bf16(as_bf16(array.as_slice()?)),
            Numbers::F16(array) => Floats::F16(as_f16(array.as_slice()?)),
        })
    }
}

/// Writes new tokens behind the rows of a layer, in place.
#[pyfunction]
#[pyo3(signature = (pools, start, length, capacity, keys, values, scales, valid, first_position, threads))]
#[allow(clippy::too_many_arguments)]
fn append<'py>(
    py: Python<'py>,
    pools: PoolArrays<'py>,
    start: &Bound<'py, PyAny>,
    length: &Bound<'py, PyAny>,
    capacity: &Bound<'py, PyAny>,
    keys: &Bound<'py, PyAny>,
    values: &Bound<'py, PyAny>,
    scales: Option<&Bound<'py, PyAny>>,
    valid: Option<&Bound<'py, PyAny>>,
    first_position: i64,
    threads: usize,
) -> PyResult<()> {
    let rows = RowNumbers::new(start, length, capacity)?;
    let valid: Option<Vec<bool>> = valid.map(|valid| copied("valid", valid)).transpose()?;
    let keys: Input<u8> = input("new keys", keys, 4)?;
    let values: Input<u8> = input("new values", values, 4)?;
    let scales: Option<Input<u8>> = scales.map(|x| input("new scales", x, 4)).transpose()?;
    let shape = keys.shape();
    if values.shape()[..3] != shape[..3] {
        return Err(PyValueError::new_err(format!(
            "new keys and new values must agree, got shapes {shape:?} and {:?}",
            values.shape()
        )));
    }
    let mut target = Written::new(&pools, "")?;
    let mut inputs: Vec<&dyn Extent> = vec![&keys, &values];
    inputs.extend(scales.as_ref().map(|x| x as &dyn Extent));
    target.apart_from(&inputs)?;
    let entries = Entries {
        batch: shape[0],
        steps: shape[2],
        columns: [keys.as_slice()?, values.as_slice()?, bytes(scales.as_ref())?],
        valid: valid.as_deref(),
        first_position,
    };
    let (mut pools, rows) = (target.pools()?, rows.rows());
    py.detach(|| headkv_core::append(&mut pools, &rows, &entries, threads)).map_err(value_error)
}

/// Copies slot `source[i]` of `pools` to slot `i` of `target`.
#[pyfunction]
fn gather<'py>(
    py: Python<'py>,
    pools: PoolArrays<'py>,
    source: &Bound<'py, PyAny>,
    target: PoolArrays<'py>,
    threads: usize,
) -> PyResult<()> {
    let keys: Input<u8> = input("keys", &pools.keys, 2)?;
    let values: Input<u8> = input("values", &pools.values, 2)?;
    let positions: Input<i32> = input("positions", &pools.positions, 1)?;
    let scales: Option<Input<u8>> = pools.scales.as_ref().map(|x| input("scales", x, 2)).transpose()?;
    let source: Vec<i64> = copied("source", source)?;
    let mut target = Written::new(&target, "new ")?;
    let mut inputs: Vec<&dyn Extent> = vec![&keys, &values, &positions];
    inputs.extend(scales.as_ref().map(|x| x as &dyn Extent));
    target.apart_from(&inputs)?;
    let columns = [keys.as_slice()?, values.as_slice()?, bytes(scales.as_ref())?];
    let (positions, mut target) = (positions.as_slice()?, target.pools()?);
    py.detach(|| headkv_core::gather(columns, positions, &source, &mut target, threads)).map_err(value_error)
}

/// Pools to be written, and what their names begin with in errors.
struct Written<'py> {
    of: &'static str,
    keys: Output<'py, u8>,
    values: Output<'py, u8>,
    positions: Output<'py, i32>,
    scales: Option<Output<'py, u8>>,
}

impl<'py> Written<'py> {
    fn new(arrays: &PoolArrays<'py>, of: &'static str) -> PyResult<Self> {
        let scales = arrays.scales.as_ref();
        Ok(Self {
            of,
            keys: output(&format!("{of}keys"), &arrays.keys, 2)?,
            values: output(&format!("{of}values"), &arrays.values, 2)?,
            positions: output(&format!("{of}positions"), &arrays.positions, 1)?,
            scales: scales.map(|x| output(&format!("{of}scales"), x, 2)).transpose()?,
        })
    }

    /// Each of them shares no memory with what is read, nor with the others.
    fn apart_from(&self, inputs: &[&dyn Extent]) -> PyResult<()> {
        let mut others = inputs.to_vec();
        let named: [(&str, &dyn Extent); 3] =
            [("positions", &self.positions), ("values", &self.values), ("keys", &self.keys)];
        for (name, pool) in self.scales.iter().map(|x| ("scales", x as &dyn Extent)).chain(named) {
            apart(&format!("{}{name}", self.of), pool, &others)?;
            others.push(pool);
        }
        Ok(())
    }

    fn pools(&mut self) -> PyResult<Pools<'_>> {
        let width = |shape: &[usize]| shape[1];
        Ok(Pools {
            widths: [
                width(self.keys.shape()),
                width(self.values.shape()),
                self.scales.as_ref().map_or(0, |x| width(x.shape())),
            ],
            columns: [
                self.keys.as_slice_mut()?,
                self.values.as_slice_mut()?,
                self.scales.as_mut().map_or(Ok(&mut [][..]), |x| x.as_slice_mut())?,
            ],
            positions: self.positions.as_slice_mut()?,
        })
    }
}

fn bytes<'a>(scales: Option<&'a Input<'_, u8>>) -> PyResult<&'a [u8]> {
    Ok(scales.map_or(Ok(&[][..]), |x| x.as_slice())?)
}

/// Vectors `[m, D]` as codes, `[m, D]` int8 or `[m, D / 2]` uint8, and scales `[m]` of the same dtype, both written.
#[pyfunction]
fn quantise<'py>(
    py: Python<'py>,
    vectors: &Bound<'py, PyAny>,
    dtype: &str,
    codes: &Bound<'py, PyAny>,
    scales: &Bound<'py, PyAny>,
) -> PyResult<()> {
    if is::<u8>(codes) {
        quantise_as::<u8>(py, vectors, dtype, codes, scales)
    } else {
        quantise_as::<i8>(py, vectors, dtype, codes, scales)
    }
}

fn quantise_as<C: Code + numpy::Element>(
    py: Python<'_>,
    vectors: &Bound<'_, PyAny>,
    dtype: &str,
    codes: &Bound<'_, PyAny>,
    scales: &Bound<'_, PyAny>,
) -> PyResult<()> {
    match dtype {
        "float32" => run_quantise::<f32, f32, C>(py, vectors, codes, scales, |x| x, |x| x),
        "bfloat16" => {
            run_quantise::<u16, bf16, C>(py, vectors, codes, scales, as_bf16, |x| x.reinterpret_cast_mut())
        }
        "float16" => {
            run_quantise::<u16, f16, C>(py, vectors, codes, scales, as_f16, |x| x.reinterpret_cast_mut())
        }
        other => Err(wrong_dtype(other)),
    }
}

fn run_quantise<Stored: numpy::Element, T: Float, C: Code + numpy::Element>(
    py: Python<'_>,
    vectors: &Bound<'_, PyAny>,
    codes: &Bound<'_, PyAny>,
    scales: &Bound<'_, PyAny>,
    meant: fn(&[Stored]) -> &[T],
    meant_mut: fn(&mut [Stored]) -> &mut [T],
) -> PyResult<()> {
    let vectors: Input<Stored> = input("vectors", vectors, 2)?;
    let mut codes: Output<C> = output("codes", codes, 2)?;
    let mut scales: Output<Stored> = output("scales", scales, 1)?;
    apart("codes", &codes, &[&vectors, &scales])?;
    apart("scales", &scales, &[&vectors])?;
    let (dim, vectors) = (vectors.shape()[1], meant(vectors.as_slice()?));
    let (codes, scales) = (codes.as_slice_mut()?, meant_mut(scales.as_slice_mut()?));
    py.detach(|| headkv_core::quantise(dim, vectors, codes, scales)).map_err(value_error)
}

/// Holds the newest of new tokens' vectors `[rows, T, D]` in `rings` `[rows, R, D]`, rotated; both of `dtype`.
#[pyfunction]
fn hold<'py>(
    py: Python<'py>,
    rings: &Bound<'py, PyAny>,
    new: &Bound<'py, PyAny>,
    dtype: &str,
    length: &Bound<'py, PyAny>,
    valid: Option<&Bound<'py, PyAny>>,
) -> PyResult<()> {
    match dtype {
        "float32" => run_hold::<f32, f32>(py, rings, new, length, valid, |x| x, |x| x),
        "bfloat16" => {
            run_hold::<u16, bf16>(py, rings, new, length, valid, as_bf16, |x| x.reinterpret_cast_mut())
        }
        "float16" => {
            run_hold::<u16, f16>(py, rings, new, length, valid, as_f16, |x| x.reinterpret_cast_mut())
        }
        other => Err(wrong_dtype(other)),
    }
}

fn run_hold<Stored: numpy::Element, T: Float>(
    py: Python<'_>,
    rings: &Bound<'_, PyAny>,
    new: &Bound<'_, PyAny>,
    length: &Bound<'_, PyAny>,
    valid: Option<&Bound<'_, PyAny>>,
    meant: fn(&[Stored]) -> &[T],
    meant_mut: fn(&mut [Stored]) -> &mut [T],
) -> PyResult<()> {
    let mut rings: Output<Stored> = output("rings", rings, 3)?;
    let new: Input<Stored> = input("new", new, 3)?;
    apart("rings", &rings, &[&new])?;
    let length: Vec<i64> = copied("length", length)?;
    let batch = valid.map(|valid| input::<bool>("valid", valid, 2)).transpose()?.map_or(1, |x| x.shape()[0]);
    let valid: Option<Vec<bool>> = valid.map(|valid| copied("valid", valid)).transpose()?;
    let (size, dim) = (rings.shape()[1], rings.shape()[2]);
    if new.shape()[0] != length.len() || new.shape()[2] != dim {
        return Err(PyValueError::new_err(format!(
            "new must have shape [{}, T, {dim}], got {:?}",
            length.len(),
            new.shape()
        )));
    }
    let (rings, new) = (meant_mut(rings.as_slice_mut()?), meant(new.as_slice()?));
    py.detach(|| {
        headkv_core::hold(rings, (size, dim), new, &length, valid.as_deref().map(|valid| (batch, valid)))
    })
    .map_err(value_error)
}

/// Names of the instruction sets that this CPU has, best first.
#[pyfunction]
fn instruction_sets() -> Vec<&'static str> {
    Isa::ALL.into_iter().filter(|isa| isa.is_available()).map(Isa::name).collect()
}

fn named_isa(name: Option<&str>) -> PyResult<Isa> {
    let Some(name) = name else { return Ok(Isa::detect()) };
    let found = Isa::ALL.into_iter().find(|isa| isa.name() == name && isa.is_available());
    found.ok_or_else(|| {
        PyValueError::new_err(format!("isa must be one of {}, got {name:?}", instruction_sets().join(", ")))
    })
}

fn is<T: numpy::Element>(array: &Bound<PyAny>) -> bool {
    array.cast::<numpy::PyArrayDyn<T>>().is_ok()
}

fn as_bf16(bits: &[u16]) -> &[bf16] {
    bits.reinterpret_cast()
}

fn as_f16(bits: &[u16]) -> &[f16] {
    bits.reinterpret_cast()
}

fn wrong_dtype(found: &str) -> PyErr {
    PyTypeError::new_err(format!("dtype must be float32, bfloat16 or float16, got {found:?}"))
}

fn value_error(error: Error) -> PyErr {
    PyValueError::new_err(error.to_string())
}

#[pymodule]
mod _rust {
    #[pymodule_export]
    use super::{append, attend, gather, hold, instruction_sets, quantise};
}
