//! What no policy changes: nodes and their links, users and their ways, containers and what they
//! write.

use godwit_policy::predict::changed;

use super::parameters as given;
use super::random::{Random, noisy, unit};
use super::whole;

/// How users move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mobility {
    /// To a point nearby, a pause, to the next one.
    Waypoint,
    /// Between two places, over and over.
    Commuter,
}

impl Mobility {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Waypoint, Self::Commuter];

    /// As in reports.
    pub fn word(self) -> &'static str {
        match self {
            Self::Waypoint => "waypoint",
            Self::Commuter => "commuter",
        }
    }
}

/// A place, in metres.
type Point = (f64, f64);

fn distance(one: Point, other: Point) -> f64 {
    (one.0 - other.0).hypot(one.1 - other.1)
}

/// A part of a container's state.
#[derive(Clone, Copy, Debug)]
pub struct Subject {
    /// In bytes.
    pub size: f64,
    /// Bytes per second.
    pub write_rate: f64,
    /// Share of it that is ever written.
    pub hot: f64,
}

impl Subject {
    fn new(random: &mut Random, (size, rate): ((f64, f64), (f64, f64))) -> Self {
        Self {
            size: random.by_logarithm(size) * given::MIB,
            write_rate: random.by_logarithm(rate) * given::MIB,
            hot: random.between(given::HOT),
        }
    }

    /// Bytes that differ after some seconds, in truth: only the hot share is written.
    pub fn differs_after(&self, seconds: f64) -> f64 {
        changed(self.size * self.hot, self.write_rate, seconds.max(0.0))
    }
}

/// A user and the one container that follows.
#[derive(Clone, Debug)]
pub struct User {
    /// Memory, volume and writable layer.
    pub subjects: [Subject; 3],
    /// Since when which node is the nearest, in seconds.
    pub path: Vec<(f64, usize)>,
}

/// A node.
#[derive(Clone, Copy, Debug)]
struct Node {
    at: Point,
    link: f64,
}

/// A site.
#[derive(Debug)]
pub struct World {
    seed: u64,
    nodes: Vec<Node>,
    /// The nodes that each has configured as peers: the nearest ones.
    peers: Vec<Vec<usize>>,
    /// As many as nodes.
    pub users: Vec<User>,
}

/// Peers that a node has configured.
const PEERS: usize = 8;

impl World {
    /// A site of `count` nodes and as many users.
    pub fn new(count: usize, mobility: Mobility, seed: u64) -> Self {
        let side = (count as f64).sqrt() * given::SPACING_M;
        let mut random = Random::new(seed, 0);
        let node = |_| Node {
            at: (random.between((0.0, side)), random.between((0.0, side))),
            link: link(random.unit()),
        };
        let nodes: Vec<Node> = (0..count).map(node).collect();
        let grid = Grid::new(&nodes, side);
        let peers = |index: usize| {
            let mut near = grid.nearest(&nodes, nodes[index].at, PEERS + 1);
            near.retain(|peer| *peer != index);
            near
        };
        let peers = (0..count).map(peers).collect();
        let user = |index: usize| {
            let mut random = Random::new(seed, 1 + index as u64);
            User {
                subjects: [given::MEMORY, given::VOLUME, given::LAYER]
                    .map(|kind| Subject::new(&mut random, kind)),
                path: path(&mut random, mobility, &nodes, &grid),
            }
        };
        let users = (0..count).map(user).collect();
        Self { seed, nodes, peers, users }
    }

    /// How many nodes there are.
    pub fn count(&self) -> usize {
        self.nodes.len()
    }

    /// The nodes that one has configured as peers.
    pub fn peers(&self, node: usize) -> &[usize] {
        &self.peers[node]
    }

    /// Seconds for a question and its answer.
    pub fn round_trip(&self, one: usize, other: usize) -> f64 {
        given::ROUND_TRIP.0
            + given::ROUND_TRIP.1 * distance(self.nodes[one].at, self.nodes[other].at)
    }

    /// A number of a node that stays for a while.
    fn weather(&self, node: usize, now: f64, what: u64) -> f64 {
        let spell = whole(now / given::WEATHER.as_secs_f64() + node as f64 * 0.37) as u64;
        unit(&[self.seed, node as u64, spell, what])
    }

    /// Bytes per second that other traffic leaves of a node's link.
    pub fn link(&self, node: usize, now: f64) -> f64 {
        self.nodes[node].link * (1.0 - given::BACKGROUND_MAX * self.weather(node, now, 1))
    }

    /// Runnable tasks per processor besides ours.
    fn load(&self, node: usize, now: f64) -> f64 {
        let (usual, high) = given::LOAD;
        let most = if self.weather(node, now, 2) < given::LOADED_SHARE { high } else { usual };
        most * self.weather(node, now, 3)
    }

    /// What a node says of its load.
    pub fn told_load(&self, node: usize, now: f64) -> f64 {
        self.load(node, now) * noisy(given::NOISE, &[self.seed, node as u64, now.to_bits()])
    }

    /// Bytes per second that a node can send: its link's, or its share of a processor's among the
    /// tasks that run.
    pub fn serves(&self, node: usize, now: f64) -> f64 {
        self.link(node, now).min(given::SERVE / (1.0 + self.load(node, now)))
    }

    /// Bytes per second that a node can take in.
    pub fn takes_in(&self, node: usize, now: f64) -> f64 {
        self.link(node, now).min(given::INGEST)
    }

    /// Seconds that a node's clock is ahead.
    pub fn clock_error(&self, node: usize) -> f64 {
        let (share, most) = given::WRONG_CLOCKS;
        let is_wrong = unit(&[self.seed, node as u64, 4]) < share;
        let error = noisy(most.as_secs_f64(), &[self.seed, node as u64, 5]) - 1.0;
        if is_wrong { error } else { 0.0 }
    }

    /// What a node measures where `truth` holds.
    pub fn measures(&self, truth: f64, node: usize, now: f64) -> f64 {
        truth * noisy(given::NOISE, &[self.seed, node as u64, now.to_bits(), 6])
    }
}

/// The link of a share of all nodes.
fn link(mut share: f64) -> f64 {
    for (rate, of_all) in given::LINKS {
        if share < of_all {
            return rate;
        }
        share -= of_all;
    }
    given::LINKS[given::LINKS.len() - 1].0
}

/// Nodes by square, to find the nearest.
struct Grid {
    side: f64,
    cells: Vec<Vec<usize>>,
    width: usize,
}

impl Grid {
    fn new(nodes: &[Node], side: f64) -> Self {
        let width = whole((side / given::SPACING_M).ceil()).max(1);
        let mut grid = Self { side, cells: vec![Vec::new(); width * width], width };
        for (index, node) in nodes.iter().enumerate() {
            let (column, row) = grid.cell(node.at);
            grid.cells[row * width + column].push(index);
        }
        grid
    }

    fn cell(&self, at: Point) -> (usize, usize) {
        let part = |value: f64| whole(value / given::SPACING_M).min(self.width - 1);
        (part(at.0), part(at.1))
    }

    /// The `count` nodes nearest to a point, nearest first.
    fn nearest(&self, nodes: &[Node], at: Point, count: usize) -> Vec<usize> {
        let (column, row) = self.cell(at);
        let by = |node: &usize| distance(nodes[*node].at, at);
        let mut found = Vec::new();
        for radius in 1..=self.width {
            let span = |middle: usize| {
                middle.saturating_sub(radius)..=(middle + radius).min(self.width - 1)
            };
            found = span(row)
                .flat_map(|row| span(column).map(move |column| row * self.width + column))
                .flat_map(|cell| self.cells[cell].iter().copied())
                .collect();
            found.sort_by(|one, other| by(one).total_cmp(&by(other)));
            found.truncate(count);
            // What lies outside of these squares is farther than this.
            let covered = radius as f64 * given::SPACING_M;
            if found.len() == count && by(&found[count - 1]) <= covered {
                break;
            }
        }
        found
    }
}

/// Since when which node is the nearest of a user.
fn path(random: &mut Random, mobility: Mobility, nodes: &[Node], grid: &Grid) -> Vec<(f64, usize)> {
    let mut walker = Walker::new(random, mobility, grid.side);
    let nearest = |at: Point| grid.nearest(nodes, at, 1)[0];
    let mut path = vec![(0.0, nearest(walker.at))];
    let steps = whole(given::RUN.as_secs_f64() / given::STEP.as_secs_f64());
    for step in 1..steps {
        walker.step(given::STEP.as_secs_f64());
        let (at, (_, host)) = (walker.at, path[path.len() - 1]);
        let next = nearest(at);
        let is_nearer =
            distance(nodes[next].at, at) < (1.0 - given::FOLLOW) * distance(nodes[host].at, at);
        if next != host && is_nearer {
            path.push((step as f64 * given::STEP.as_secs_f64(), next));
        }
    }
    path
}

/// A user on the way.
struct Walker<'a> {
    random: &'a mut Random,
    mobility: Mobility,
    side: f64,
    at: Point,
    to: Point,
    /// Where a commuter goes back to.
    other: Point,
    speed: f64,
    pause: f64,
}

impl<'a> Walker<'a> {
    fn new(random: &'a mut Random, mobility: Mobility, side: f64) -> Self {
        let at = (random.between((0.0, side)), random.between((0.0, side)));
        let mut walker =
            Self { random, mobility, side, at, to: at, other: at, speed: 1.0, pause: 0.0 };
        walker.other = walker.point_near(given::COMMUTER_RANGE);
        walker.pause = walker.random.between((0.0, walker.stay().1));
        walker
    }

    fn stay(&self) -> (f64, f64) {
        match self.mobility {
            Mobility::Waypoint => given::WAYPOINT_PAUSE,
            Mobility::Commuter => given::COMMUTER_STAY,
        }
    }

    fn point_near(&mut self, range: f64) -> Point {
        let (at, side) = (self.at, self.side);
        let mut near = |middle: f64| {
            self.random.between(((middle - range).max(0.0), (middle + range).min(side)))
        };
        (near(at.0), near(at.1))
    }

    fn step(&mut self, seconds: f64) {
        if self.pause > 0.0 {
            self.pause -= seconds;
            if self.pause <= 0.0 {
                self.depart();
            }
            return;
        }
        let left = distance(self.at, self.to);
        let share = self.speed * seconds / left.max(1e-9);
        if share >= 1.0 {
            self.at = self.to;
            self.pause = self.random.between(self.stay()).max(1e-9);
        } else {
            self.at.0 += (self.to.0 - self.at.0) * share;
            self.at.1 += (self.to.1 - self.at.1) * share;
        }
    }

    fn depart(&mut self) {
        match self.mobility {
            Mobility::Waypoint => {
                self.to = self.point_near(given::WAYPOINT_RANGE);
                self.speed = self.random.between(given::WAYPOINT_SPEED);
            }
            Mobility::Commuter => {
                (self.to, self.other) = (self.other, self.at);
                self.speed = self.random.between(given::COMMUTER_SPEED);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_world_is_the_same_for_the_same_seed_and_users_move_in_it() {
        for mobility in Mobility::ALL {
            let [one, again, other] = [7, 7, 8].map(|seed| World::new(50, mobility, seed));
            let paths = |world: &World| {
                world.users.iter().map(|user| user.path.clone()).collect::<Vec<_>>()
            };
            assert_eq!(paths(&one), paths(&again));
            assert_ne!(paths(&one), paths(&other));
            let moves: usize = one.users.iter().map(|user| user.path.len() - 1).sum();
            assert!(moves > 50, "{moves} moves in all");
            assert!(
                one.users.iter().all(|user| user
                    .path
                    .is_sorted_by(|one, next| one.0 < next.0 && one.1 != next.1))
            );
        }
    }

    #[test]
    fn peers_are_the_nearest_nodes() {
        let world = World::new(200, Mobility::Waypoint, 1);
        for node in 0..200 {
            let farthest = world
                .peers(node)
                .iter()
                .map(|peer| world.round_trip(node, *peer))
                .fold(0.0, f64::max);
            let nearer =
                (0..200).filter(|other| world.round_trip(node, *other) <= farthest).count();
            assert_eq!(nearer, PEERS + 1, "and the node itself");
        }
        assert_eq!(World::new(5, Mobility::Waypoint, 1).peers(0).len(), 4);
    }
}
