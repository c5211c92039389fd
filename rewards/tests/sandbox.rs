//! Hostile and clumsy scripts: each becomes data with a kind and a line, and the next sample is scored right.

use std::time::{Duration, Instant};

use rft_rewards::{Context, ErrorKind, Limits, OnError, Outcome, RewardPool, RewardSpec, Sample, Script};

const LIMITS: Limits = Limits { time_ms: 200, memory_bytes: 16 << 20, instructions: Some(2_000_000) };

fn score(script: &str, completions: &[&str], workers: usize) -> Vec<Outcome> {
    let spec = RewardSpec { limits: LIMITS, ..RewardSpec::new(Script::from_text("mine", script).unwrap()) };
    let pool = RewardPool::new(vec![spec], workers).unwrap();
    let samples = completions.iter().enumerate().map(|(i, text)| Sample {
        id: "row".into(),
        sample: i as u32,
        completion: (*text).to_string(),
        tokens: (0..text.len() as u32).collect(),
        token_text_ends: (1..=text.len() as u32).collect(),
        ..Sample::default()
    });
    pool.submit(1, samples.collect(), Context { step: 2, total_steps: 9, seed: 5 });
    pool.recv().1
}

/// Bodies of `if bad then … end`, with the kinds they may end in.
const HOSTILE: &[(&str, &[ErrorKind])] = &[
    ("while true do end", &[ErrorKind::Timeout, ErrorKind::Instructions]),
    ("repeat local x = 1 until false", &[ErrorKind::Timeout, ErrorKind::Instructions]),
    ("for i = 1, math.huge do end", &[ErrorKind::Timeout, ErrorKind::Instructions]),
    (
        "while true do pcall(function() while true do end end) end",
        &[ErrorKind::Timeout, ErrorKind::Instructions],
    ),
    ("pcall(function() while true do end end) return 1", &[ErrorKind::Timeout, ErrorKind::Instructions]),
    ("while true do pcall(error, 'x') end", &[ErrorKind::Timeout, ErrorKind::Instructions]),
    (
        "local function f() return f() end return f()",
        &[ErrorKind::Timeout, ErrorKind::Instructions, ErrorKind::Runtime],
    ),
    (
        "local function f() return 1 + f() end return f()",
        &[ErrorKind::Runtime, ErrorKind::Instructions, ErrorKind::Memory],
    ),
    (
        "string.find(string.rep('a', 5000), string.rep('a?', 5000) .. string.rep('a', 5000))",
        &[ErrorKind::Timeout, ErrorKind::Instructions, ErrorKind::Runtime],
    ),
    (
        "string.match(string.rep('x', 200000), '.-.-.-.-.-.-y')",
        &[ErrorKind::Timeout, ErrorKind::Instructions, ErrorKind::Runtime],
    ),
    ("local t = {} while true do t[#t + 1] = string.rep('x', 1000) .. #t end", &[ErrorKind::Memory]),
    ("local s = 'x' while true do s = s .. s end", &[ErrorKind::Memory, ErrorKind::Runtime]),
    ("return string.rep('x', 1e9)", &[ErrorKind::Memory, ErrorKind::Runtime]),
    ("local t = table.create(1e8, 0) return #t", &[ErrorKind::Memory, ErrorKind::Runtime]),
    ("local b = buffer.create(1e9) return 1", &[ErrorKind::Memory, ErrorKind::Runtime]),
    (
        "pcall(function() local t = {} while true do t[#t + 1] = string.rep('x', 1000) .. #t end end) return 0 / 0",
        &[ErrorKind::Memory, ErrorKind::NotFinite],
    ),
    ("return 0 / 0", &[ErrorKind::NotFinite]),
    ("return math.huge", &[ErrorKind::NotFinite]),
    ("return { a = -math.huge }", &[ErrorKind::NotFinite]),
    ("return 'one'", &[ErrorKind::WrongType]),
    ("return '1'", &[ErrorKind::WrongType]),
    ("return true", &[ErrorKind::WrongType]),
    ("return {}", &[ErrorKind::WrongType]),
    ("return { 1, 2 }", &[ErrorKind::WrongType]),
    ("return { a = 'x' }", &[ErrorKind::WrongType]),
    ("return function() end", &[ErrorKind::WrongType]),
    ("return { a = 1, [1] = 2 }", &[ErrorKind::WrongType]),
    ("return { { from = 3, to = 1, value = 1 } }", &[ErrorKind::WrongType]),
    ("local t = {} for i = 1, 1000 do t['k' .. i] = 1 end return t", &[ErrorKind::WrongType]),
    ("return setmetatable({}, { __index = function() while true do end end })", &[ErrorKind::WrongType]),
    ("return setmetatable({ a = 1 }, { __index = error }).b", &[ErrorKind::Runtime]),
    ("error('plain')", &[ErrorKind::Runtime]),
    ("error({ code = 1 })", &[ErrorKind::Runtime]),
    ("error(nil)", &[ErrorKind::Runtime]),
    (
        "error(setmetatable({}, { __tostring = function() while true do end end }))",
        &[ErrorKind::Runtime, ErrorKind::Timeout, ErrorKind::Instructions],
    ),
    ("return sample.missing.field", &[ErrorKind::Runtime]),
    ("return sample.completion + 1", &[ErrorKind::Runtime]),
    ("return os.execute('true')", &[ErrorKind::Runtime]),
    ("return io.open('/etc/passwd')", &[ErrorKind::Runtime]),
    ("return require('x')", &[ErrorKind::Runtime]),
    ("return loadstring('return 1')()", &[ErrorKind::Runtime]),
    ("return debug.getinfo(1)", &[ErrorKind::Runtime]),
    ("return getfenv(0)", &[ErrorKind::Runtime]),
    ("string.find = nil return 1", &[ErrorKind::Runtime]),
    ("math.floor = function() return 9 end return 1", &[ErrorKind::Runtime]),
    ("rft.math.equal = nil return 1", &[ErrorKind::Runtime]),
    ("rft.hacked = 1 return 1", &[ErrorKind::Runtime]),
    ("setmetatable(string, {}) return 1", &[ErrorKind::Runtime]),
    ("getmetatable('').__index = {} return 1", &[ErrorKind::Runtime]),
    ("setmetatable(_G, { __index = function() return 1 end }) return 1", &[ErrorKind::Runtime]),
    ("return rft.edit_distance(string.rep('a', 100000), string.rep('b', 100000))", &[ErrorKind::Runtime]),
    ("return rft.regex.match('x', '(')", &[ErrorKind::Runtime]),
    ("return rft.regex.match('x', string.rep('(a{1000}){1000}', 10))", &[ErrorKind::Runtime]),
    ("return rft.boxes.iou({1, 2}, {3})", &[ErrorKind::Runtime]),
    ("return rft.math.equal(1)", &[ErrorKind::Runtime]),
    ("local t = {} t.t = t return rft.json.encode(t)", &[ErrorKind::Runtime]),
    ("return math.random(2, 1)", &[ErrorKind::Runtime]),
    (
        "local c = coroutine.wrap(function() while true do coroutine.yield() end end) while true do c() end",
        &[ErrorKind::Runtime, ErrorKind::Timeout, ErrorKind::Instructions],
    ),
    (
        "table.sort({ 3, 2, 1 }, function() while true do end end)",
        &[ErrorKind::Timeout, ErrorKind::Instructions],
    ),
    (
        "string.gsub(string.rep('a', 1e6), '.', function() while true do end end)",
        &[ErrorKind::Timeout, ErrorKind::Instructions],
    ),
    ("string.format('%99999d', 1)", &[ErrorKind::Runtime]),
    (
        "return table.concat(table.create(1e6, string.rep('x', 100)))",
        &[ErrorKind::Memory, ErrorKind::Runtime],
    ),
    ("return select('#', table.unpack(table.create(1e6, 1)))", &[ErrorKind::Runtime, ErrorKind::Memory]),
];

#[test]
fn every_hostile_script_becomes_data_and_the_next_sample_is_scored() {
    assert!(HOSTILE.len() >= 60, "{}", HOSTILE.len());
    let mut contained = 0;
    for (body, kinds) in HOSTILE {
        let script = format!(
            "function reward(sample, ctx)\n  if sample.completion == 'bad' then\n    {body}\n  end\n  return #sample.completion\nend\n"
        );
        let start = Instant::now();
        let outcomes = score(&script, &["abc", "bad", "abcd"], 1);
        assert!(start.elapsed() < Duration::from_secs(3), "{body}: {:?}", start.elapsed());
        assert_eq!((outcomes[0].reward, outcomes[2].reward), (Some(3.0), Some(4.0)), "{body}");
        let bad = &outcomes[1];
        assert_eq!((bad.reward, bad.errors.len()), (None, 1), "{body}: {bad:?}");
        assert!(kinds.contains(&bad.errors[0].kind), "{body}: {:?}", bad.errors[0]);
        contained += 1;
    }
    println!("{contained} of {} hostile scripts contained", HOSTILE.len());
}

#[test]
fn an_error_names_the_line() {
    let outcomes =
        score("function reward(sample)\n  local x = 1\n  return sample.missing.field\nend", &["x"], 1);
    let error = &outcomes[0].errors[0];
    assert_eq!((error.line, error.script.as_str()), (Some(3), "mine"), "{error:?}");
    assert!(error.to_string().contains("sample.missing.field"), "{error}");
}

#[test]
fn nothing_leaks_from_a_call_to_the_next() {
    let script = "count = (count or 0) + 1\nlocal seen = 0\nfunction reward(sample)\n  seen += 1\n  leaked = (leaked or 0) + 1\n  return count * 100 + seen * 10 + leaked\nend";
    let rewards: Vec<_> = score(script, &["a", "b", "c"], 1).iter().map(|o| o.reward).collect();
    assert_eq!(rewards, [Some(111.0); 3]);
}

#[test]
fn random_numbers_depend_on_the_sample_alone() {
    let script = "function reward(sample) return math.random() + math.random(1, 6) end";
    let texts: Vec<String> = (0..20).map(|i| i.to_string()).collect();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let one = score(script, &texts, 1);
    assert_eq!(one, score(script, &texts, 8));
    assert_ne!(one[0].reward, one[1].reward);
}

#[test]
fn components_abstention_groups_and_dense_spans() {
    let outcomes = score(
        "function reward(s) if s.completion == 'x' then return nil end return { long = #s.completion, b = 0.5 } end",
        &["x", "abc"],
        1,
    );
    assert_eq!((outcomes[0].reward, &outcomes[0].components), (None, &vec![("mine".to_string(), None)]));
    assert_eq!(outcomes[1].reward, Some(3.5));
    assert_eq!(outcomes[1].components, [("b".to_string(), Some(0.5)), ("long".to_string(), Some(3.0))]);

    let group = score(
        "function reward_group(samples, ctx) local out = {} for i in samples do out[i] = i == 2 and 0/0 or ctx.step * #samples end return out end",
        &["a", "b", "c"],
        2,
    );
    assert_eq!((group[0].reward, group[1].reward, group[2].reward), (Some(6.0), None, Some(6.0)));
    assert_eq!(group[1].errors[0].kind, ErrorKind::NotFinite);

    let dense = score(
        "function reward(s) local a, b = string.find(s.completion, 'bc') return { { from = a, to = b, value = 2 } } end",
        &["abcd"],
        1,
    );
    assert_eq!((dense[0].reward, &dense[0].token_rewards), (Some(2.0), &vec![0.0, 0.0, 2.0, 0.0]));
}

#[test]
fn lists_and_spans_of_the_wrong_length_are_errors() {
    for (list, word) in [
        ("{1, 2}", "ends after 2"),
        ("{}", "ends after 0"),
        ("{1, 2, nil}", "ends after 2"),
        ("{1, 2, 3, 4}", "at [4]"),
        ("{1, 2, 3, mean = 2}", "at [mean]"),
        ("{[0] = 1, 2, 3, 4}", "at [0]"),
        ("7", "it returned"),
    ] {
        let group = score(&format!("function reward_group() return {list} end"), &["a", "b", "c"], 2);
        for outcome in &group {
            assert_eq!(outcome.errors[0].kind, ErrorKind::WrongType, "{list}");
            assert!(outcome.errors[0].message.contains(word), "{list}: {}", outcome.errors[0].message);
            assert_eq!(outcome.reward, None);
        }
    }
    let group = score("function reward_group() return {1, nil, rft.null} end", &["a", "b", "c"], 2);
    assert_eq!(group.iter().map(|o| o.reward).collect::<Vec<_>>(), [Some(1.0), None, None]);
    assert!(group.iter().all(|o| o.errors.is_empty()));

    let dense = score("function reward() return { { 1, 5, 1 } } end", &["abcd"], 1);
    assert_eq!((dense[0].reward, dense[0].errors[0].kind), (None, ErrorKind::WrongType));
    assert!(dense[0].errors[0].message.contains("byte 5"), "{}", dense[0].errors[0].message);
}

#[test]
fn prefix_logprobs_follow_token_ends_and_say_what_is_missing() {
    let ask = |body: &str, sample: Sample| {
        let text = format!("function reward(sample, ctx) return {body} end");
        let pool =
            RewardPool::new(vec![RewardSpec::new(Script::from_text("mine", &text).unwrap())], 1).unwrap();
        pool.submit(0, vec![sample], Context::default());
        pool.recv().1.remove(0)
    };
    let known = Sample {
        completion: "abcdef".into(),
        tokens: vec![1, 2, 3],
        token_text_ends: vec![2, 4, 6],
        logprobs: vec![-1.0, -2.0, -4.0],
        ..Sample::default()
    };
    for (body, expected) in [
        ("rft.prefix_logprob(sample)", -7.0),
        ("rft.prefix_logprob(sample, 0)", 0.0),
        ("rft.prefix_logprob(sample, 3)", -1.0),
        ("rft.prefix_logprob(sample, 4)", -3.0),
        ("ctx.logprobs[3]", -4.0),
    ] {
        assert_eq!(ask(body, known.clone()).reward, Some(expected), "{body}");
    }
    let unknown = ask("rft.prefix_logprob(sample)", Sample::default());
    assert!(unknown.errors[0].message.contains("no `logprobs`"), "{:?}", unknown.errors);
    let stored = Sample { token_text_ends: Vec::new(), ..known };
    let unplaced = ask("rft.prefix_logprob(sample, 2)", stored);
    assert!(unplaced.errors[0].message.contains("no `token_ends`"), "{:?}", unplaced.errors);
}

#[test]
fn state_changes_between_steps_alone_and_survives_a_restart() {
    let script = "function reward(s, ctx) return (ctx.state.sum or 0) + #s.completion / 3 end
function update_state(state, results, ctx)
  for _, r in results do state.sum = (state.sum or 0) * 0.9 + r.reward end
  state.last = results[#results].id
  return state
end";
    let spec = || RewardSpec::new(Script::from_text("mine", script).unwrap());
    let step = |pool: &RewardPool, step: u64| {
        let context = Context { step, total_steps: 4, seed: 1 };
        for ticket in 0..16u64 {
            let completion = "x".repeat((ticket + step) as usize);
            pool.submit(ticket, vec![Sample { completion, ..Sample::default() }], context);
        }
        let done: std::collections::BTreeMap<u64, Outcome> =
            (0..16).map(|_| pool.recv()).map(|(t, mut o)| (t, o.remove(0))).collect();
        let ids: Vec<String> = done.keys().map(|t| format!("row{t}")).collect();
        let results = done.values().zip(&ids).map(|(o, id)| (id.as_str(), 0, "", o));
        pool.end_step(results, &context).unwrap();
        done.values().map(|o| o.reward.unwrap().to_bits()).collect::<Vec<_>>()
    };
    let (one, eight) = (RewardPool::new(vec![spec()], 1).unwrap(), RewardPool::new(vec![spec()], 8).unwrap());
    let first = step(&one, 1);
    assert_eq!(first, step(&eight, 1));
    let resumed = RewardPool::new(vec![spec()], 2).unwrap();
    resumed.set_states(&one.states());
    let second = step(&one, 2);
    assert_ne!(first, second);
    assert_eq!((&second, &second), (&step(&eight, 2), &step(&resumed, 2)));
    assert_eq!(one.states(), resumed.states());
    assert!(one.states()[0].contains("row15"), "{:?}", one.states());
}

#[test]
fn state_is_read_only_in_a_step_and_its_failures_have_a_line() {
    let pool = |script: &str| {
        RewardPool::new(vec![RewardSpec::new(Script::from_text("mine", script).unwrap())], 1).unwrap()
    };
    let writes =
        pool("function reward(s, ctx) ctx.state.x = 1 return 1 end function update_state(s) return s end");
    writes.submit(0, vec![Sample::default()], Context::default());
    let outcome = writes.recv().1.remove(0);
    assert!(outcome.errors[0].message.contains("readonly"), "{:?}", outcome.errors);
    for (body, word) in [
        ("return 1", "must return the new state"),
        ("return { f = print }", "no JSON form"),
        ("return { s = string.rep('x', 300000) }", "at most"),
        ("return { x = 0 / 0 }", "not a JSON number"),
        ("error('no')", "no"),
        ("while true do end", "took more than"),
    ] {
        let bad = pool(&format!("function reward() return 1 end\nfunction update_state(state) {body} end"));
        let error = bad.end_step([], &Context::default()).unwrap_err();
        assert!(error.message.contains(word), "{body}: {error}");
        assert_eq!(&*bad.states()[0], "{}", "{body}");
    }
}

#[test]
fn absent_libraries_say_so() {
    for name in ["coroutine.wrap", "io.open", "os.time"] {
        let outcomes = score(&format!("function reward()\n  return {name}('x')\nend"), &["x"], 1);
        let error = &outcomes[0].errors[0];
        assert!(error.message.contains("does not exist in the sandbox"), "{error}");
        assert_eq!(error.line, Some(2), "{error}");
    }
}

#[test]
fn a_failed_call_follows_its_policy_and_is_never_a_silent_zero() {
    let script = Script::from_text("mine", "function reward() error('no') end").unwrap();
    let run = |on_error| {
        let spec = RewardSpec { on_error, weight: 2.0, ..RewardSpec::new(script.clone()) };
        let pool = RewardPool::new(vec![spec], 1).unwrap();
        pool.submit(0, vec![Sample::default()], Context::default());
        pool.recv().1.remove(0)
    };
    let abstain = run(OnError::Abstain);
    assert_eq!((abstain.reward, abstain.fatal, abstain.errors.len()), (None, false, 1));
    assert!(run(OnError::Fail).fatal);
    assert_eq!(run(OnError::Score(-1.0)).reward, Some(-2.0));
}

#[test]
fn a_script_that_cannot_load_says_where() {
    let error = Script::from_text("mine", "function reward(\n  return 1\nend").unwrap_err().to_string();
    assert!(error.contains("mine.lua:2"), "{error}");
    let error = Script::from_text("mine", "local x = 1").unwrap_err().to_string();
    assert!(error.contains("neither"), "{error}");
    let error = rft_rewards::resolve("maths").unwrap_err().to_string();
    assert!(error.contains("did you mean \"math\""), "{error}");
}
