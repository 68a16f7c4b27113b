//! Any order of calls, against a model of what the contract says.

use proptest::prelude::*;

use super::*;

/// What is to be known of a snapshot: its kind, its parent and what its own tree holds.
type Model = BTreeMap<String, (Kind, Option<String>)>;

#[derive(Clone, Debug)]
enum Step {
    Prepare(String, Option<String>),
    View(String, Option<String>),
    Commit(String, String),
    Remove(String),
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    let name = || "[a-e]";
    let parent = || proptest::option::of("[a-e]");
    prop_oneof![
        4 => (name(), parent()).prop_map(|(key, parent)| Step::Prepare(key, parent)),
        1 => (name(), parent()).prop_map(|(key, parent)| Step::View(key, parent)),
        4 => (name(), name()).prop_map(|(name, key)| Step::Commit(name, key)),
        2 => name().prop_map(Step::Remove),
        1 => Just(Step::Reopen),
    ]
}

/// What the contract says of `step`, in words of the model. The order in which errors are found is
/// free.
fn expected(model: &mut Model, step: &Step) -> bool {
    match step {
        Step::Prepare(key, parent) | Step::View(key, parent) => {
            let committed = |name: &String| matches!(model.get(name), Some((Kind::Committed, _)));
            let fine = !model.contains_key(key) && parent.as_ref().is_none_or(committed);
            if fine {
                let kind = if matches!(step, Step::View(..)) { Kind::View } else { Kind::Active };
                model.insert(key.clone(), (kind, parent.clone()));
            }
            fine
        }
        Step::Commit(name, key) => match model.get(key).cloned() {
            Some((Kind::Active, parent)) if !model.contains_key(name) => {
                model.remove(key);
                model.insert(name.clone(), (Kind::Committed, parent));
                true
            }
            _ => false,
        },
        Step::Remove(key) => {
            let childless = model.values().all(|(_, parent)| parent.as_ref() != Some(key));
            childless && model.remove(key).is_some()
        }
        Step::Reopen => true,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Method: any calls over five names, with restarts between them; after each, the same
    /// snapshots as the model, with the same parents, and exactly one directory each.
    #[test]
    fn any_order_of_calls_agrees_with_the_model(steps in proptest::collection::vec(step(), 1..30)) {
        let dir = scratch();
        let mut snapshots = Snapshotter::open(dir.path()).unwrap();
        let mut model = Model::new();
        for step in steps {
            let done = match &step {
                Step::Prepare(key, parent) => {
                    snapshots.prepare(key, parent.as_deref(), none()).is_ok()
                }
                Step::View(key, parent) => snapshots.view(key, parent.as_deref(), none()).is_ok(),
                Step::Commit(name, key) => snapshots.commit(name, key, none()).is_ok(),
                Step::Remove(key) => {
                    snapshots.remove(key).and_then(|()| snapshots.cleanup()).is_ok()
                }
                Step::Reopen => {
                    drop(snapshots);
                    snapshots = Snapshotter::open(dir.path()).unwrap();
                    true
                }
            };
            prop_assert_eq!(done, expected(&mut model, &step), "{:?}", step);
            let found: Model = snapshots
                .list(&[])
                .unwrap()
                .into_iter()
                .map(|info| (info.name, (info.kind, info.parent)))
                .collect();
            prop_assert_eq!(&found, &model);
            prop_assert_eq!(trees(dir.path()).len(), model.len());
            for (key, (kind, _)) in &model {
                let mounts = snapshots.mounts(key);
                prop_assert_eq!(mounts.is_ok(), *kind != Kind::Committed);
            }
        }
    }
}
