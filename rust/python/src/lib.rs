//! `headkv._rust`: takes numpy views of torch's memory, checks them, and calls headkv-core without the interpreter lock.
//!
//! float32 pools come as float32 arrays, bfloat16 and float16 ones as uint16 arrays of their bits, 8-bit codes as int8 ones.

mod arrays;

use headkv_core::{
    Element, Entries, Error, Float, HalfBitsSliceExt, Isa, Layer, Options, Pools, Queries, Rows, Scales,
    Sums, bf16, f16,
};
use numpy::prelude::*;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;

use crate::arrays::{Input, Output, apart, copied, input, output};

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
}

/// The storage of a layer, read or written: any object with these attributes.
#[derive(FromPyObject)]
struct PoolArrays<'py> {
    keys: Bound<'py, PyAny>,
    values: Bound<'py, PyAny>,
    positions: Bound<'py, PyAny>,
    /// The bytes of them.
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
        _ if is::<i8>(&layer.keys) => call.run::<i8, i8>(py, &layer, |pool| pool),
        "float32" => call.run::<f32, f32>(py, &layer, |pool| pool),
        "bfloat16" => call.run::<u16, bf16>(py, &layer, as_bf16),
        "float16" => call.run::<u16, f16>(py, &layer, as_f16),
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
    /// `Stored` is what numpy holds, `T` what it means.
    fn run<Stored: numpy::Element, T: Element>(
        &self,
        py: Python<'_>,
        arrays: &LayerArrays<'_>,
        meant: fn(&[Stored]) -> &[T],
    ) -> PyResult<()> {
        let q: Input<f32> = input("q", self.q, 4)?;
        let query_positions: Vec<i64> = copied("query_positions", self.query_positions)?;
        let sink_logits: Option<Vec<f32>> =
            self.sink_logits.map(|sinks| copied("sink_logits", sinks)).transpose()?;
        let keys: Input<Stored> = input("keys", &arrays.keys, 2)?;
        let values: Input<Stored> = input("values", &arrays.values, 2)?;
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
        if is::<i8>(&arrays.keys) != arrays.scales.is_some() {
            return Err(PyValueError::new_err("scales must be given with int8 keys, and with no others"));
        }
        let given = arrays.scales.as_ref();
        let (wide, bits) = if self.dtype == "float32" { (given, None) } else { (None, given) };
        let wide: Option<Input<f32>> = wide.map(|scales| input("scales", scales, 2)).transpose()?;
        let bits: Option<Input<u16>> = bits.map(|scales| input("scales", scales, 2)).transpose()?;
        let scales = match (&wide, &bits, self.dtype) {
            (Some(scales), _, _) => Some(Scales::F32(scales.as_slice()?)),
            (_, Some(scales), "bfloat16") => Some(Scales::Bf16(as_bf16(scales.as_slice()?))),
            (_, Some(scales), "float16") => Some(Scales::F16(as_f16(scales.as_slice()?))),
            (_, Some(_), other) => return Err(wrong_dtype(other)),
            (None, None, _) => None,
        };
        let mut out: Output<f32> = output("out", self.out, 4)?;
        let shape = q.shape();
        if out.shape() != shape {
            return Err(PyValueError::new_err(format!(
                "out must have the shape of q {shape:?}, got {:?}",
                out.shape()
            )));
        }
        for (name, width) in [("keys", keys.shape()[1]), ("values", values.shape()[1])] {
            if width != shape[3] {
                return Err(PyValueError::new_err(format!(
                    "{name} must have the width of q {}, got {width}",
                    shape[3]
                )));
            }
        }
        apart("out", &out, &[&q, &keys, &values, &positions])?;

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
            keys: meant(keys.as_slice()?),
            values: meant(values.as_slice()?),
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
            scales,
        };
        let (options, out) = (self.options, out.as_slice_mut()?);
        py.detach(|| headkv_core::attend(&layer, &queries, &options, out)).map_err(value_error)
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
    let call = Append { rows, keys, values, scales, valid, first_position, threads };
    if is::<f32>(&pools.keys) {
        call.run::<f32>(py, &pools)
    } else if is::<i8>(&pools.keys) {
        call.run::<i8>(py, &pools)
    } else {
        call.run::<u16>(py, &pools)
    }
}

struct Append<'a, 'py> {
    rows: RowNumbers,
    keys: &'a Bound<'py, PyAny>,
    values: &'a Bound<'py, PyAny>,
    scales: Option<&'a Bound<'py, PyAny>>,
    valid: Option<Vec<bool>>,
    first_position: i64,
    threads: usize,
}

impl Append<'_, '_> {
    fn run<T: numpy::Element + Copy + Send + Sync>(
        &self,
        py: Python<'_>,
        arrays: &PoolArrays<'_>,
    ) -> PyResult<()> {
        let new_keys: Input<T> = input("new keys", self.keys, 4)?;
        let new_values: Input<T> = input("new values", self.values, 4)?;
        let mut keys: Output<T> = output("keys", &arrays.keys, 2)?;
        let mut values: Output<T> = output("values", &arrays.values, 2)?;
        let mut positions: Output<i32> = output("positions", &arrays.positions, 1)?;
        let new_scales: Option<Input<u8>> = self.scales.map(|x| input("new scales", x, 4)).transpose()?;
        let mut scales: Option<Output<u8>> =
            arrays.scales.as_ref().map(|x| output("scales", x, 2)).transpose()?;
        let shape = new_keys.shape();
        if new_values.shape() != shape || values.shape() != keys.shape() || keys.shape()[1] != shape[3] {
            return Err(PyValueError::new_err(format!(
                "new keys, new values, keys and values must agree, got shapes {shape:?}, {:?}, {:?} and {:?}",
                new_values.shape(),
                keys.shape(),
                values.shape()
            )));
        }
        apart("keys", &keys, &[&new_keys, &new_values, &values, &positions])?;
        apart("values", &values, &[&new_keys, &new_values, &positions])?;
        apart("positions", &positions, &[&new_keys, &new_values])?;
        if let Some(scales) = &scales {
            apart("scales", scales, &[&new_keys, &new_values, &keys, &values, &positions])?;
            if let Some(new) = &new_scales {
                apart("scales", scales, &[new])?;
            }
        }
        let entries = Entries {
            batch: shape[0],
            steps: shape[2],
            keys: new_keys.as_slice()?,
            values: new_values.as_slice()?,
            scales: new_scales.as_ref().map_or(Ok(&[][..]), |x| x.as_slice())?,
            valid: self.valid.as_deref(),
            first_position: self.first_position,
        };
        let mut pools = Pools {
            head_dim: shape[3],
            keys: keys.as_slice_mut()?,
            values: values.as_slice_mut()?,
            positions: positions.as_slice_mut()?,
            scales: scales.as_mut().map_or(Ok(&mut [][..]), |x| x.as_slice_mut())?,
        };
        let (rows, threads) = (self.rows.rows(), self.threads);
        py.detach(|| headkv_core::append(&mut pools, &rows, &entries, threads)).map_err(value_error)
    }
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
    if is::<f32>(&pools.keys) {
        run_gather::<f32>(py, &pools, source, &target, threads)
    } else if is::<i8>(&pools.keys) {
        run_gather::<i8>(py, &pools, source, &target, threads)
    } else {
        run_gather::<u16>(py, &pools, source, &target, threads)
    }
}

fn run_gather<T: numpy::Element + Copy + Send + Sync>(
    py: Python<'_>,
    pools: &PoolArrays<'_>,
    source: &Bound<'_, PyAny>,
    target: &PoolArrays<'_>,
    threads: usize,
) -> PyResult<()> {
    let keys: Input<T> = input("keys", &pools.keys, 2)?;
    let values: Input<T> = input("values", &pools.values, 2)?;
    let positions: Input<i32> = input("positions", &pools.positions, 1)?;
    let source: Vec<i64> = copied("source", source)?;
    let mut new_keys: Output<T> = output("new keys", &target.keys, 2)?;
    let mut new_values: Output<T> = output("new values", &target.values, 2)?;
    let mut new_positions: Output<i32> = output("new positions", &target.positions, 1)?;
    let scales: Option<Input<u8>> = pools.scales.as_ref().map(|x| input("scales", x, 2)).transpose()?;
    let mut new_scales: Option<Output<u8>> =
        target.scales.as_ref().map(|x| output("new scales", x, 2)).transpose()?;
    let widths = [keys.shape()[1], values.shape()[1], new_keys.shape()[1], new_values.shape()[1]];
    if widths.iter().any(|&width| width != widths[0]) {
        return Err(PyValueError::new_err(format!("keys and values must have one width, got {widths:?}")));
    }
    let inputs: [&dyn arrays::Extent; 3] = [&keys, &values, &positions];
    apart("new keys", &new_keys, &[inputs.as_slice(), &[&new_values, &new_positions]].concat())?;
    apart("new values", &new_values, &[inputs.as_slice(), &[&new_positions]].concat())?;
    apart("new positions", &new_positions, &inputs)?;
    if let (Some(scales), Some(new)) = (&scales, &new_scales) {
        let others: [&dyn arrays::Extent; 4] = [&new_keys, &new_values, &new_positions, scales];
        apart("new scales", new, &[inputs.as_slice(), &others].concat())?;
    }
    let bytes = scales.as_ref().map_or(Ok(&[][..]), |x| x.as_slice())?;
    let from = (keys.as_slice()?, values.as_slice()?, positions.as_slice()?, bytes);
    let mut to = Pools {
        head_dim: widths[0],
        keys: new_keys.as_slice_mut()?,
        values: new_values.as_slice_mut()?,
        positions: new_positions.as_slice_mut()?,
        scales: new_scales.as_mut().map_or(Ok(&mut [][..]), |x| x.as_slice_mut())?,
    };
    py.detach(|| headkv_core::gather(from, &source, &mut to, threads)).map_err(value_error)
}

/// Vectors `[m, D]` as codes `[m, D]` and scales `[m]` of the same dtype, both written.
#[pyfunction]
fn quantise<'py>(
    py: Python<'py>,
    vectors: &Bound<'py, PyAny>,
    dtype: &str,
    codes: &Bound<'py, PyAny>,
    scales: &Bound<'py, PyAny>,
) -> PyResult<()> {
    match dtype {
        "float32" => run_quantise::<f32, f32>(py, vectors, codes, scales, |x| x, |x| x),
        "bfloat16" => {
            run_quantise::<u16, bf16>(py, vectors, codes, scales, as_bf16, |x| x.reinterpret_cast_mut())
        }
        "float16" => {
            run_quantise::<u16, f16>(py, vectors, codes, scales, as_f16, |x| x.reinterpret_cast_mut())
        }
        other => Err(wrong_dtype(other)),
    }
}

fn run_quantise<Stored: numpy::Element, T: Float>(
    py: Python<'_>,
    vectors: &Bound<'_, PyAny>,
    codes: &Bound<'_, PyAny>,
    scales: &Bound<'_, PyAny>,
    meant: fn(&[Stored]) -> &[T],
    meant_mut: fn(&mut [Stored]) -> &mut [T],
) -> PyResult<()> {
    let vectors: Input<Stored> = input("vectors", vectors, 2)?;
    let mut codes: Output<i8> = output("codes", codes, 2)?;
    let mut scales: Output<Stored> = output("scales", scales, 1)?;
    apart("codes", &codes, &[&vectors, &scales])?;
    apart("scales", &scales, &[&vectors])?;
    let (dim, vectors) = (vectors.shape()[1], meant(vectors.as_slice()?));
    let (codes, scales) = (codes.as_slice_mut()?, meant_mut(scales.as_slice_mut()?));
    py.detach(|| headkv_core::quantise(dim, vectors, codes, scales)).map_err(value_error)
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
    use super::{append, attend, gather, instruction_sets, quantise};
}
