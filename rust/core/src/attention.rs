//! Attention of new tokens over a layer: checks, shares of equal work for the threads, results put together.

use crate::compensation::{self, Mean};
use crate::element::Element;
use crate::error::{Error, Result, check_len};
use crate::kernel::{self, LANE_QUERIES, State, Task};
use crate::layer::{Layer, Visible};
use crate::math::softcap_scalar;
use crate::quantised::rotate;
use crate::residual::{self, Newest};
use crate::schedule::{self, Item, Tile};
use crate::scratch;
use crate::simd::Isa;
use crate::threads;

/// Work (entries x passes of four queries x D) below which waking threads costs more than they save.
const SERIAL_WORK: usize = 1 << 18;
/// Shares for each thread: a few, so that a thread that was interrupted does not keep the others waiting for long.
const SHARES: usize = 4;

/// New tokens, whose keys and values the layer already holds.
#[derive(Clone, Copy)]
pub struct Queries<'a> {
    pub batch: usize,
    /// Query heads HQ, a multiple of the KV heads; query head `i` reads KV head `i / (HQ / H)`.
    pub heads: usize,
    /// Tokens T of each sequence.
    pub steps: usize,
    /// `[B, HQ, T, D]`
    pub data: &'a [f32],
    /// `[B, T]`, where in the text the queries stand
    pub positions: &'a [i64],
    /// `[HQ]`, of each query head one more logit that has no value, or `-inf`
    pub sink_logits: Option<&'a [f32]>,
}

#[derive(Debug, Clone, Copy)]
pub struct Options {
    pub scale: f32,
    /// Entries at this distance or more are not seen.
    pub sliding_window: Option<i64>,
    /// Logits become `c tanh(logit / c)`.
    pub softcap: Option<f32>,
    pub threads: usize,
    pub isa: Isa,
}

/// Attention of each query over its row, causal by positions: `out` `[B, HQ, T, D]`. A query that sees nothing gives 0.
///
/// A query at position p sees the entries at positions up to p, within the sliding window if there is one; of a windowed
/// row only the first `sinks` and the last `recent` of those up to p. A compensating row adds one entry for what it hides
/// or has dropped: mean key and mean value, with ln of their number on the logit.
///
/// Every thread gets an equal share of the entries, however they are spread over the rows; parts of a row are merged by
/// their log-sum-exp.
pub fn attend<K: Element, V: Element>(
    layer: &Layer<K, V>,
    queries: &Queries,
    options: &Options,
    out: &mut [f32],
) -> Result<()> {
    check(layer, queries, options, out)?;
    if out.is_empty() {
        return Ok(());
    }
    if layer.head_dim.is_multiple_of(2) {
        attend_checked(&layer.paired(), queries, options, out);
    } else {
        attend_checked(layer, queries, options, out);
    }
    Ok(())
}

fn attend_checked<K: Element, V: Element>(
    layer: &Layer<K, V>,
    queries: &Queries,
    options: &Options,
    out: &mut [f32],
) {
    let plan = Plan::new(layer, queries, options);
    let (partial, owners) = plan.partials(layer, queries, options);
    plan.combine(layer, queries, options, &partial, &owners, out);
}

fn check<K: Element, V: Element>(
    layer: &Layer<K, V>,
    queries: &Queries,
    options: &Options,
    out: &[f32],
) -> Result<()> {
    layer.check()?;
    options.isa.require()?;
    let rows = layer.rows.count();
    let kv_heads = rows.checked_div(queries.batch).unwrap_or(0);
    if kv_heads * queries.batch != rows || kv_heads == 0 {
        return Err(Error::new(format!(
            "rows must be a positive multiple of batch, got {rows} and {}",
            queries.batch
        )));
    }
    if queries.heads == 0 || !queries.heads.is_multiple_of(kv_heads) {
        let heads = queries.heads;
        return Err(Error::new(format!(
            "query heads must be a positive multiple of the {kv_heads} KV heads, got {heads}"
        )));
    }
    let elements = [queries.heads, queries.steps, layer.head_dim]
        .iter()
        .try_fold(queries.batch, |product, &size| product.checked_mul(size))
        .ok_or_else(|| Error::new("q must fit the address space"))?;
    check_len("q", queries.data.len(), elements)?;
    check_len("out", out.len(), elements)?;
    check_len("query_positions", queries.positions.len(), queries.batch * queries.steps)?;
    if let Some(sinks) = queries.sink_logits {
        check_len("sink_logits", sinks.len(), queries.heads)?;
        if let Some(sink) = sinks.iter().find(|&&sink| sink.is_nan() || sink == f32::INFINITY) {
            return Err(Error::new(format!("sink_logits must be below infinity, got {sink}")));
        }
    }
    if !options.scale.is_finite() {
        return Err(Error::new(format!("scale must be finite, got {}", options.scale)));
    }
    if options.sliding_window.is_some_and(|window| window < 1) {
        return Err(Error::new("sliding_window must be at least 1"));
    }
    if options.sliding_window.is_some() && layer.sums.is_some() {
        return Err(Error::new("sliding_window can not be combined with compensation entries"));
    }
    if let Some(cap) = options.softcap.filter(|&cap| !(cap > 0.0 && cap.is_finite())) {
        return Err(Error::new(format!("softcap must be positive and finite, got {cap}")));
    }
    Ok(())
}

/// What every step sees, the tiles that follow from it, and the compensation entries.
struct Plan {
    /// Queries of a row, `[G, T]`.
    queries_of_row: usize,
    steps: usize,
    /// `[rows, T]`
    visible: Vec<Visible>,
    /// `[rows, T]`, without what is seen as it came; empty where nothing is
    coded: Vec<Visible>,
    tiles: Vec<Tile>,
    /// `[rows]`, each `[T]` or empty
    means: Vec<Vec<Option<Mean>>>,
    threads: usize,
}

/// Softmax so far of every item, `[item][group of four queries]`, and the weighted sums beside it.
struct Partial {
    states: Vec<State>,
    sums: Vec<f32>,
}

impl Plan {
    fn new<K: Element, V: Element>(layer: &Layer<K, V>, queries: &Queries, options: &Options) -> Plan {
        let (rows, steps) = (layer.rows.count(), queries.steps);
        let kv_heads = rows / queries.batch;
        let queries_of_row = queries.heads / kv_heads * steps;
        let mut visible = Vec::with_capacity(rows * steps);
        let mut coded = Vec::new();
        let mut tiles = Vec::new();
        for row in 0..rows {
            let (_, _, positions) = layer.row(row);
            let (sinks, recent) = (layer.sinks[row], layer.recent[row]);
            for &position in &queries.positions[row / kv_heads * steps..][..steps] {
                visible.push(Visible::new(positions, position, options.sliding_window, sinks, recent).0);
            }
            if layer.residual.is_some() {
                let end = residual::span(layer, row).begin;
                coded.extend(visible[row * steps..].iter().map(|seen| seen.until(end)));
            }
            let read = if coded.is_empty() { &visible } else { &coded };
            schedule::tiles_of_row(row, queries_of_row, &read[row * steps..], &mut tiles);
        }
        let parallel = schedule::work(&tiles) * layer.head_dim >= SERIAL_WORK;
        let threads = if parallel { options.threads.max(1) } else { 1 };

        let mut means: Vec<Vec<Option<Mean>>> = (0..rows).map(|_| Vec::new()).collect();
        if layer.sums.is_some() {
            let slots = means.iter_mut().enumerate().collect();
            threads::for_each(threads, slots, |(row, mean): (usize, &mut Vec<Option<Mean>>)| {
                *mean = compensation::means(layer, row, &visible[row * steps..][..steps]);
            });
        }
        Plan { queries_of_row, steps, visible, coded, tiles, means, threads }
    }

    /// Runs the kernel over equal shares of the entries. Also returns, for each tile, its range of groups in the result.
    fn partials<K: Element, V: Element>(
        &self,
        layer: &Layer<K, V>,
        queries: &Queries,
        options: &Options,
    ) -> (Partial, Vec<std::ops::Range<usize>>) {
        let width = LANE_QUERIES * scratch::width::<V>(layer.head_dim);
        let count = if self.threads > 1 { self.threads * SHARES } else { 1 };
        let shares = schedule::shares(&self.tiles, count);
        let groups = |item: &Item| self.tiles[item.tile].count.div_ceil(LANE_QUERIES);
        let total: usize = shares.iter().flatten().map(groups).sum();
        let mut partial = Partial { states: vec![State::EMPTY; total], sums: vec![0.0; total * width] };

        let mut owners = vec![0..0; self.tiles.len()];
        let mut end = 0;
        for item in shares.iter().flatten() {
            let owner = &mut owners[item.tile];
            if owner.start == owner.end {
                owner.start = end;
            }
            end += groups(item);
            owner.end = end;
        }

        let mut work = Vec::with_capacity(shares.len());
        let (mut states, mut sums) = (partial.states.as_mut_slice(), partial.sums.as_mut_slice());
        for share in &shares {
            let size: usize = share.iter().map(groups).sum();
            let (mine, rest) = states.split_at_mut(size);
            let (my_sums, rest_sums) = sums.split_at_mut(size * width);
            work.push((share, mine, my_sums));
            (states, sums) = (rest, rest_sums);
        }
        threads::for_each(self.threads, work, |(share, mut states, mut sums)| {
            for item in share {
                let (mine, rest) = states.split_at_mut(groups(item));
                let (my_sums, rest_sums) = sums.split_at_mut(groups(item) * width);
                self.run(layer, queries, options, item, mine, my_sums);
                (states, sums) = (rest, rest_sums);
            }
        });
        (partial, owners)
    }

    fn run<K: Element, V: Element>(
        &self,
        layer: &Layer<K, V>,
        queries: &Queries,
        options: &Options,
        item: &Item,
        states: &mut [State],
        sums: &mut [f32],
    ) {
        let tile = &self.tiles[item.tile];
        let (dim, width) = (layer.head_dim, scratch::width::<K>(layer.head_dim));
        let (keys, values, _) = layer.row(tile.row);
        let padded_count = tile.count.next_multiple_of(LANE_QUERIES);
        let mut scaled = vec![0.0; padded_count * width];
        let turned = self.turned(layer, queries, options, tile);
        for (target, query) in scaled.chunks_exact_mut(width).zip(turned.chunks_exact(dim)) {
            scratch::spread::<K>(query, target);
        }
        // The fourth query that is not there sees what the last one sees, so that no block is masked for its sake.
        let read = if self.coded.is_empty() { &self.visible } else { &self.coded };
        let read = &read[tile.row * self.steps..];
        let visible: Vec<Visible> =
            (0..padded_count).map(|i| read[(tile.first + i.min(tile.count - 1)) % self.steps]).collect();
        let task = Task {
            head_dim: dim,
            keys,
            values,
            scales: layer.scales_of(tile.row),
            spans: tile.spans(item.piece),
            queries: &scaled,
            visible: &visible,
            softcap: options.softcap,
        };
        kernel::run(options.isa, &task, states, sums);
    }

    /// What the queries of a tile see as it came.
    fn newest<K: Element, V: Element>(
        &self,
        layer: &Layer<K, V>,
        queries: &Queries,
        options: &Options,
        tile: &Tile,
    ) -> Option<Newest> {
        layer.residual?;
        let turned = self.turned(layer, queries, options, tile);
        let seen = &self.visible[tile.row * self.steps..];
        let visible: Vec<Visible> = (0..tile.count).map(|i| seen[(tile.first + i) % self.steps]).collect();
        Newest::attend(layer, tile.row, &turned, &visible, options.softcap, options.isa)
    }

    /// The queries of a tile, scaled, `[count, D]`.
    fn turned<K: Element, V: Element>(
        &self,
        layer: &Layer<K, V>,
        queries: &Queries,
        options: &Options,
        tile: &Tile,
    ) -> Vec<f32> {
        let dim = layer.head_dim;
        let first = tile.row * self.queries_of_row + tile.first;
        let data = &queries.data[first * dim..(first + tile.count) * dim];
        let mut turned: Vec<f32> = data.iter().map(|x| x * options.scale).collect();
        // Codes are of rotated keys; a query that is rotated as well has the same products with them.
        if layer.scales.is_some() {
            turned.chunks_exact_mut(dim).for_each(rotate);
        }
        turned
    }

    /// Merges the parts of each tile, what is seen as it came, the compensation entry, and the sink, into the output.
    fn combine<K: Element, V: Element>(
        &self,
        layer: &Layer<K, V>,
        queries: &Queries,
        options: &Options,
        partial: &Partial,
        owners: &[std::ops::Range<usize>],
        out: &mut [f32],
    ) {
        let dim = layer.head_dim;
        let mut work = Vec::with_capacity(self.tiles.len());
        let mut rest = out;
        for (tile, owner) in self.tiles.iter().zip(owners) {
            let (mine, after) = rest.split_at_mut(tile.count * dim);
            work.push((tile, owner.clone(), mine));
            rest = after;
        }
        // For a few queries a row (decoding), merging is too little work to share.
        let threads = if self.steps > 1 || layer.residual.is_some() { self.threads } else { 1 };
        threads::for_each(threads, work, |(tile, owner, out)| {
            let means = &self.means[tile.row];
            let newest = self.newest(layer, queries, options, tile);
            for (i, out) in out.chunks_exact_mut(dim).enumerate() {
                let query = tile.first + i;
                let mean = means.get(query % self.steps).and_then(Option::as_ref).map(|mean| {
                    let at = (tile.row * self.queries_of_row + query) * dim;
                    let dot: f32 = queries.data[at..][..dim].iter().zip(&mean.key).map(|(q, k)| q * k).sum();
                    (
                        softcap_scalar(dot * options.scale, options.softcap) + mean.log_count,
                        mean.value.as_slice(),
                    )
                });
                let part = newest.as_ref().map(|newest| newest.part(i));
                let sink = queries.sink_logits.map_or(f32::NEG_INFINITY, |sinks| {
                    sinks[(tile.row * self.queries_of_row + query) / self.steps % queries.heads]
                });
                let groups = tile.count.div_ceil(LANE_QUERIES);
                let parts = (owner.start + i / LANE_QUERIES..owner.end).step_by(groups);
                merge::<V>(partial, parts, i % LANE_QUERIES, part, mean, sink, layer.scales.is_some(), out);
            }
        });
    }
}

/// One query: the parts `groups`, in which it is number `lane`, perhaps one more part (largest logit, sum of weights, values)
/// and one more entry (logit, value), and a logit that has no value, or `-inf`. With `rotated` the parts are sums of rotated
/// values; the output is not.
#[allow(clippy::too_many_arguments)]
fn merge<V: Element>(
    partial: &Partial,
    groups: impl Iterator<Item = usize> + Clone,
    lane: usize,
    part: Option<(f32, f32, &[f32])>,
    mean: Option<(f32, &[f32])>,
    sink: f32,
    rotated: bool,
    out: &mut [f32],
) {
    let width = scratch::width::<V>(out.len());
    let tops = groups.clone().map(|group| partial.states[group].top[lane]);
    let others = part.map(|(top, ..)| top).into_iter().chain(mean.map(|(logit, _)| logit));
    let top = tops.chain(others).fold(sink, f32::max);
    // Parts without a visible entry, and all of them when nothing is visible: weight 0, not e^(-inf + inf).
    let weight = |logit: f32| if logit == f32::NEG_INFINITY { 0.0 } else { (logit - top).exp() };
    out.fill(0.0);
    let mut total = weight(sink);
    for group in groups {
        let state = &partial.states[group];
        let weight = if state.sum[lane].is_nan() { f32::NAN } else { weight(state.top[lane]) };
        total += weight * state.sum[lane];
        scratch::collect::<V>(weight, &partial.sums[(group * LANE_QUERIES + lane) * width..][..width], out);
    }
    if let Some((top, sum, values)) = part {
        let weight = if sum.is_nan() { f32::NAN } else { weight(top) };
        total += weight * sum;
        scratch::collect::<f32>(weight, values, out);
    }
    if rotated {
        rotate(out);
    }
    if let Some((logit, value)) = mean {
        total += weight(logit);
        out.iter_mut().zip(value).for_each(|(out, x)| *out += weight(logit) * x);
    }
    if total != 0.0 {
        out.iter_mut().for_each(|out| *out /= total);
    }
}
