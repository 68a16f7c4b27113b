//! Links and what flows over them.
//!
//! The model: max-min fairness at both ends. A node divides its way out so that none gets more
//! than it can take where it goes, and all others the same; a destination divides its way in
//! likewise among what is offered to it. A flow never exceeds a window per round trip. When a flow
//! begins or ends, its neighbours in both nodes are computed again and theirs are not, so that for
//! seconds the rates are a little off what is fair in a whole site.
//!
//! A [`Transfer`] is one phase of a migration: *pools* of bytes, each with the set of senders that
//! have them, and the senders. Each takes from the pool that fewest others have, so all end
//! together if they can. The source is sender 0; it has everything, but does of itself only what
//! no other node has, and helps under the same condition as in `peer/queue.rs`: when the neighbours
//! would take longer for what is left than the source alone for everything.
//!
//! A difference that a frozen container waits for is urgent: others get what it leaves of the way
//! out of its node, as in `peer/freeze_gate.rs`.
//!
//! Only what changes costs: when a flow begins or ends, those that share a link with it are
//! computed again.

use std::collections::BTreeSet;

use super::parameters as given;
use super::world::World;

/// As in `peer/queue.rs`: how much longer than from the source alone, and how long every neighbour
/// has first.
const COST_MAX: f64 = 1.05;
const GRACE: f64 = 0.05;

/// Senders begin at multiples of this many seconds: fewer instants to compute, and less than the
/// noise of anything.
const TICK: f64 = 0.01;

/// Less than a byte is nothing.
const NOTHING: f64 = 1.0;

/// What is left to others on the way out of a node while a frozen container's difference goes
/// there: a share.
const LEFT_BY_URGENT: f64 = 0.01;

/// Rates are computed again after this many seconds at the latest, since other traffic changes.
const REFRESH: f64 = 30.0;

/// One that sends.
#[derive(Clone, Debug, Default)]
pub struct Sender {
    /// Which node.
    pub node: usize,
    /// When its first bytes can come, in seconds.
    pub begins: f64,
    /// Bytes that came from it.
    pub sent: f64,
    /// Seconds in which something came from it.
    pub busy: f64,
    pool: Option<usize>,
    rate: f64,
}

impl Sender {
    /// One that can send from an instant on, which is rounded up so that several begin at once.
    pub fn new(node: usize, begins: f64) -> Self {
        let begins = (begins / TICK).ceil() * TICK;
        Self { node, begins, ..Self::default() }
    }
}

/// Bytes that the same senders have.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pool {
    /// Bit 0 is the source and always set.
    pub senders: u64,
    /// How many are left.
    pub bytes: f64,
}

/// One phase of one migration.
#[derive(Clone, Debug)]
pub struct Transfer {
    into: usize,
    /// The source first.
    pub senders: Vec<Sender>,
    pools: Vec<Pool>,
    total: f64,
    begun: f64,
    updated: f64,
    helps: bool,
    is_urgent: bool,
    version: u64,
}

impl Transfer {
    fn left(&self) -> f64 {
        self.pools.iter().map(|pool| pool.bytes).sum()
    }

    fn advance(&mut self, now: f64) {
        let passed = now - self.updated;
        self.updated = now;
        for sender in &mut self.senders {
            let Some(pool) = sender.pool else { continue };
            sender.sent += sender.rate * passed;
            sender.busy += passed;
            let bytes = &mut self.pools[pool].bytes;
            *bytes -= sender.rate * passed;
        }
        for pool in self.pools.iter_mut().filter(|pool| pool.bytes < NOTHING) {
            pool.bytes = 0.0;
        }
    }

    /// The pool that a sender takes from: the one that fewest others have.
    fn pool_for(&self, index: usize, now: f64) -> Option<usize> {
        let sender = &self.senders[index];
        let may_take = |pool: &Pool| {
            pool.bytes > 0.0
                && pool.senders & 1 << index != 0
                && (index > 0 || self.helps || pool.senders == 1)
        };
        let pools = self.pools.iter().enumerate().filter(|(_, pool)| may_take(pool));
        let rarest = pools.min_by_key(|(_, pool)| pool.senders.count_ones()).map(|(pool, _)| pool);
        rarest.filter(|_| sender.begins <= now)
    }

    /// Whether the source is to help, if it could send at `rate`.
    fn should_help(&self, now: f64, rate: f64) -> bool {
        if self.helps || self.senders[0].pool.is_some() || self.left() == 0.0 {
            return false;
        }
        let neighbours = || self.senders.iter().skip(1);
        if neighbours().any(|sender| now < sender.begins + GRACE) {
            return false;
        }
        let together: f64 = neighbours().map(|sender| sender.rate).sum();
        let alone = self.total / rate * COST_MAX + GRACE;
        together < rate && now - self.begun + self.left() / together.max(1.0) > alone
    }

    /// When something of this transfer changes by itself.
    fn due(&self, now: f64) -> f64 {
        let mut rates = vec![0.0; self.pools.len()];
        for sender in &self.senders {
            if let Some(pool) = sender.pool {
                rates[pool] += sender.rate;
            }
        }
        let ends = self.pools.iter().zip(rates).filter(|(_, rate)| *rate > 0.0);
        let ends = ends.map(|(pool, rate)| now + pool.bytes / rate);
        let begins = || self.senders.iter().map(|sender| sender.begins);
        let judged = begins().fold(0.0, f64::max) + GRACE;
        let begins = begins().chain([judged]).filter(|at| *at > now);
        ends.chain(begins).fold(now + REFRESH, f64::min)
    }
}

/// When to look at a transfer again; outdated unless the version is still the transfer's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Due {
    /// In seconds.
    pub at: f64,
    /// Which transfer.
    pub transfer: usize,
    version: u64,
}

/// All links of a site.
#[derive(Debug)]
pub struct Network<'w> {
    world: &'w World,
    transfers: Vec<Option<Transfer>>,
    free: Vec<usize>,
    next_version: u64,
    /// By node, the transfers that it sends to.
    from: Vec<BTreeSet<usize>>,
    /// By node, the transfers to it.
    into: Vec<BTreeSet<usize>>,
    /// By node, bytes per second that one more could send to it.
    levels: Vec<f64>,
    /// What to look at later; the caller takes it away.
    pub due: Vec<Due>,
}

impl<'w> Network<'w> {
    /// Links without traffic.
    pub fn new(world: &'w World) -> Self {
        let nodes = vec![BTreeSet::new(); world.count()];
        Self {
            world,
            transfers: Vec::new(),
            free: Vec::new(),
            next_version: 0,
            levels: vec![given::INGEST; world.count()],
            from: nodes.clone(),
            into: nodes,
            due: Vec::new(),
        }
    }

    /// Announces a transfer that senders can begin at `begun` or later. `senders` begins with the
    /// source.
    pub fn begin(
        &mut self,
        now: f64,
        begun: f64,
        into: usize,
        senders: Vec<Sender>,
        mut pools: Vec<Pool>,
        is_urgent: bool,
    ) -> usize {
        pools.retain(|pool| pool.bytes >= NOTHING);
        let total = pools.iter().map(|pool| pool.bytes).sum();
        let (updated, helps, version) = (now, false, 0);
        let transfer =
            Transfer { into, senders, pools, total, begun, updated, helps, is_urgent, version };
        let number = self.free.pop().unwrap_or_else(|| {
            self.transfers.push(None);
            self.transfers.len() - 1
        });
        self.transfers[number] = Some(transfer);
        self.into[into].insert(number);
        self.settle(now, number);
        number
    }

    /// Looks at a transfer that is due. Returns it if everything is there.
    pub fn look(&mut self, now: f64, due: Due) -> Option<Transfer> {
        let transfer = self.transfers[due.transfer].as_ref()?;
        if transfer.version != due.version {
            return None;
        }
        self.settle(now, due.transfer);
        let is_done = self.transfers[due.transfer].as_ref().is_some_and(|one| one.left() == 0.0);
        if !is_done {
            return None;
        }
        let transfer = self.transfers[due.transfer].take()?;
        self.into[transfer.into].remove(&due.transfer);
        self.free.push(due.transfer);
        Some(transfer)
    }

    /// Computes again what a transfer takes, and all that share a link with it.
    fn settle(&mut self, now: f64, first: usize) {
        let mut todo = vec![first];
        let mut touched = BTreeSet::new();
        while let Some(number) = todo.pop() {
            let mut destinations = BTreeSet::new();
            for node in self.assign(now, number) {
                let others =
                    self.from[node].iter().filter_map(|other| self.transfers[*other].as_ref());
                destinations.extend(others.map(|other| other.into));
            }
            destinations.extend(self.transfers[number].as_ref().map(|one| one.into));
            for destination in destinations {
                self.divide(now, destination);
                for number in self.into[destination].clone() {
                    touched.insert(number);
                    if self.begins_to_help(now, number) {
                        todo.push(number);
                    }
                }
            }
        }
        for number in touched {
            let Some(transfer) = self.transfers[number].as_mut() else { continue };
            self.next_version += 1;
            transfer.version = self.next_version;
            let at = if transfer.left() == 0.0 { now } else { transfer.due(now) };
            self.due.push(Due { at, transfer: number, version: self.next_version });
        }
    }

    /// Gives every sender of a transfer its pool. Returns the nodes that began or ceased to send.
    fn assign(&mut self, now: f64, number: usize) -> Vec<usize> {
        let Some(transfer) = self.transfers[number].as_mut() else { return Vec::new() };
        transfer.advance(now);
        let mut changed = Vec::new();
        for index in 0..transfer.senders.len() {
            let pool = transfer.pool_for(index, now);
            let sender = &mut transfer.senders[index];
            if pool.is_some() != sender.pool.is_some() {
                changed.push(sender.node);
                let others = &mut self.from[sender.node];
                if pool.is_some() {
                    others.insert(number)
                } else {
                    others.remove(&number)
                };
            }
            (sender.pool, sender.rate) = (pool, 0.0);
        }
        changed
    }

    /// Bytes per second that a node offers to a transfer, whether it sends to it already or not.
    fn offer(&self, now: f64, node: usize, number: usize) -> f64 {
        let Some(this) = self.transfers[number].as_ref() else { return 0.0 };
        let window = given::WINDOW / self.world.round_trip(node, this.into);
        let others = self.from[node].iter().filter(|other| **other != number);
        let others = others.filter_map(|other| self.transfers[*other].as_ref());
        let (urgent, others): (Vec<_>, Vec<_>) = others.partition(|other| other.is_urgent);
        let all = self.world.serves(node, now);
        let (mut room, rivals) = if this.is_urgent {
            (all, urgent)
        } else {
            let before: f64 = urgent.iter().map(|other| other.senders[0].rate).sum();
            ((all - before).max(LEFT_BY_URGENT * all), others)
        };
        let mut takes: Vec<f64> = rivals.iter().map(|rival| self.levels[rival.into]).collect();
        takes.sort_by(f64::total_cmp);
        let mut left = takes.len() + 1;
        for take in takes {
            if take >= room / left as f64 {
                break;
            }
            room -= take;
            left -= 1;
        }
        window.min(room / left as f64)
    }

    /// Divides the way into a node.
    fn divide(&mut self, now: f64, into: usize) {
        let mut flows = Vec::new();
        for number in &self.into[into] {
            let Some(transfer) = self.transfers[*number].as_mut() else { continue };
            transfer.advance(now);
            let active = transfer.senders.iter().enumerate().filter(|(_, one)| one.pool.is_some());
            flows.extend(active.map(|(index, one)| (*number, index, one.node)));
        }
        let mut offers: Vec<(f64, usize, usize)> = flows
            .into_iter()
            .map(|(number, index, node)| (self.offer(now, node, number), number, index))
            .collect();
        offers.sort_by(|one, other| one.0.total_cmp(&other.0));
        let (mut room, mut left) = (self.world.takes_in(into, now), offers.len());
        self.levels[into] = room;
        for (offer, number, index) in offers {
            let fair = room / left as f64;
            let rate = offer.min(fair);
            if offer >= fair {
                self.levels[into] = fair;
            }
            room -= rate;
            left -= 1;
            if let Some(transfer) = self.transfers[number].as_mut() {
                transfer.senders[index].rate = rate;
            }
        }
    }

    fn begins_to_help(&mut self, now: f64, number: usize) -> bool {
        let Some(transfer) = self.transfers[number].as_ref() else { return false };
        let (source, into) = (transfer.senders[0].node, transfer.into);
        let could = self.offer(now, source, number).min(self.world.takes_in(into, now));
        let helps = transfer.should_help(now, could);
        if let Some(transfer) = self.transfers[number].as_mut() {
            transfer.helps |= helps;
        }
        helps
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::sim::world::Mobility;

    /// Runs until nothing is under way; returns transfers by number, and when they were done.
    fn run(mut network: Network<'_>) -> BTreeMap<usize, (Transfer, f64)> {
        let (mut todo, mut done) = (Vec::new(), BTreeMap::new());
        loop {
            todo.append(&mut network.due);
            todo.sort_by(|one: &Due, other: &Due| other.at.total_cmp(&one.at));
            let Some(due) = todo.pop() else { break };
            assert!(due.at < 10_000.0, "it ends some time");
            if let Some(transfer) = network.look(due.at, due) {
                done.insert(due.transfer, (transfer, due.at));
            }
        }
        assert!(network.from.iter().chain(&network.into).all(BTreeSet::is_empty));
        assert!(network.transfers.iter().all(Option::is_none));
        done
    }

    /// Runs one transfer alone.
    fn alone(world: &World, into: usize, from: &[usize], pools: Vec<Pool>) -> (Transfer, f64) {
        let mut network = Network::new(world);
        let begun = network.begin(0.0, 0.0, into, senders(from), pools, false);
        run(network).remove(&begun).unwrap()
    }

    fn pool(senders: u64, mib: f64) -> Pool {
        Pool { senders, bytes: mib * given::MIB }
    }

    fn senders(nodes: &[usize]) -> Vec<Sender> {
        nodes.iter().map(|node| Sender::new(*node, 0.0)).collect()
    }

    fn sent(transfer: &Transfer) -> f64 {
        transfer.senders.iter().map(|sender| sender.sent).sum()
    }

    #[test]
    fn everything_arrives_and_a_destination_takes_in_no_more_than_it_can() {
        let world = World::new(20, Mobility::Waypoint, 3);
        for into in 0..10 {
            let pools = vec![pool(1, 10.0), pool(0b11, 50.0), pool(0b1111, 200.0)];
            let (done, at) = alone(&world, into, &[10, 11, 12, 13], pools);
            assert!((sent(&done) / given::MIB - 260.0).abs() < 0.01, "{done:?}");
            assert!(at >= 260.0 * given::MIB / given::INGEST, "all channels together: {at}");
            assert!(done.senders[0].sent >= 9.99 * given::MIB, "what no other node has");
        }
    }

    #[test]
    fn a_way_out_is_shared_and_what_one_cannot_use_is_for_the_others() {
        let world = World::new(20, Mobility::Waypoint, 3);
        let (_, single) = alone(&world, 1, &[0], vec![pool(1, 100.0)]);
        let mut network = Network::new(&world);
        let all: Vec<usize> = (1..12)
            .map(|into| network.begin(0.0, 0.0, into, senders(&[0]), vec![pool(1, 100.0)], false))
            .collect();
        let done = run(network);
        assert_eq!(done.len(), all.len());
        let last = done.values().map(|(_, at)| *at).fold(0.0, f64::max);
        assert!(done[&all[0]].1 > 1.5 * single, "{} s instead of {single} s", done[&all[0]].1);
        // Nothing of the way out is left idle for long, except by other traffic that comes and
        // goes.
        let best = 1100.0 * given::MIB / world.serves(0, 0.0);
        assert!(last < 3.0 * best, "{last} s instead of {best} s");
    }

    #[test]
    fn the_source_helps_slow_neighbours_and_leaves_fast_ones_alone() {
        let world = World::new(50, Mobility::Waypoint, 5);
        let rate = |node: &usize| world.serves(*node, 0.0);
        let mut nodes: Vec<usize> = (1..50).collect();
        nodes.sort_by(|one, other| rate(one).total_cmp(&rate(other)));
        let (slow, fast) = (nodes[0], nodes[48]);
        let (done, _) = alone(&world, 0, &[slow, fast], vec![pool(0b11, 100.0)]);
        assert_eq!(done.senders[0].sent, 0.0);
        let (done, at) = alone(&world, 0, &[fast, slow], vec![pool(0b11, 100.0)]);
        assert!(done.senders[0].sent > done.senders[1].sent);
        let (_, without) = alone(&world, 0, &[fast], vec![pool(1, 100.0)]);
        assert!(at <= without * COST_MAX + 2.0 * GRACE, "{at} s, {without} s without");
    }
}
