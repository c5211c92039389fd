//! Writing GGUF files for tests: from metadata and tensors, or from a model folder as llama.cpp's converter does.

use std::path::Path;

use rft_engine::model::source::ModelSource;
use rft_engine::model::spec::RopeScaling;
use serde_json::Value;

fn file_json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// A metadata value of a test file: GGUF type and bytes.
pub enum Meta<'a> {
    /// A 32-bit count.
    U32(u32),
    /// A 32-bit float.
    F32(f32),
    /// A text.
    Text(&'a str),
    /// A list of texts.
    Texts(Vec<String>),
    /// A list of integers.
    I32s(Vec<i32>),
}

/// Writes a GGUF file of f32 tensors (shape slowest first).
pub fn gguf_bytes(metadata: &[(&str, Meta<'_>)], tensors: &[(String, Vec<usize>, Vec<f32>)]) -> Vec<u8> {
    let text = |out: &mut Vec<u8>, s: &str| {
        out.extend((s.len() as u64).to_le_bytes());
        out.extend(s.as_bytes());
    };
    let mut out = b"GGUF\x03\0\0\0".to_vec();
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        text(&mut out, key);
        match value {
            Meta::U32(n) => out.extend([4u32, *n].map(u32::to_le_bytes).concat()),
            Meta::F32(x) => out.extend([6u32.to_le_bytes(), x.to_le_bytes()].concat()),
            Meta::Text(s) => {
                out.extend(8u32.to_le_bytes());
                text(&mut out, s);
            }
            Meta::Texts(list) => {
                out.extend([9u32, 8].map(u32::to_le_bytes).concat());
                out.extend((list.len() as u64).to_le_bytes());
                list.iter().for_each(|s| text(&mut out, s));
            }
            Meta::I32s(list) => {
                out.extend([9u32, 5].map(u32::to_le_bytes).concat());
                out.extend((list.len() as u64).to_le_bytes());
                list.iter().for_each(|n| out.extend(n.to_le_bytes()));
            }
        }
    }
    let mut offset = 0u64;
    for (name, shape, values) in tensors {
        text(&mut out, name);
        out.extend((shape.len() as u32).to_le_bytes());
        shape.iter().rev().for_each(|d| out.extend((*d as u64).to_le_bytes()));
        out.extend(0u32.to_le_bytes());
        out.extend(offset.to_le_bytes());
        offset = (offset + 4 * values.len() as u64).next_multiple_of(32);
    }
    for (_, _, values) in tensors {
        out.resize(out.len().next_multiple_of(32), 0);
        values.iter().for_each(|v| out.extend(v.to_le_bytes()));
    }
    out
}

/// What llama.cpp's converter does to a folder of a family: names, norm offsets, and the row order of q and k.
pub fn to_gguf(folder: &Path, arch: &str) -> Vec<u8> {
    let source = ModelSource::open(folder).unwrap();
    let spec = source.spec();
    let renamed = |name: &str| {
        let gemma = arch.starts_with("gemma");
        let (after_attention, before_mlp) =
            if gemma { ("post_attention_norm", "ffn_norm") } else { ("ffn_norm", "unused") };
        name.replace("model.embed_tokens", "token_embd")
            .replace("model.norm", "output_norm")
            .replace("lm_head", "output")
            .replace("model.layers", "blk")
            .replace("input_layernorm", "attn_norm")
            .replace("post_attention_layernorm", after_attention)
            .replace("pre_feedforward_layernorm", before_mlp)
            .replace("post_feedforward_layernorm", "post_ffw_norm")
            .replace("self_attn.q_proj", "attn_q")
            .replace("self_attn.k_proj", "attn_k")
            .replace("self_attn.v_proj", "attn_v")
            .replace("self_attn.o_proj", "attn_output")
            .replace("self_attn.q_norm", "attn_q_norm")
            .replace("self_attn.k_norm", "attn_k_norm")
            .replace("block_sparse_moe.gate.", "ffn_gate_inp.")
            .replace("mlp.gate.", "ffn_gate_inp.")
            .replace("mlp.gate_proj", "ffn_gate")
            .replace("mlp.up_proj", "ffn_up")
            .replace("mlp.down_proj", "ffn_down")
    };
    let mut tensors = vec![];
    for name in source.names() {
        let shape = source.shape(&name).unwrap();
        let mut values = source.tensor(&name, &shape).unwrap();
        let heads = if name.contains("q_proj") { spec.heads } else { spec.kv_heads };
        if arch == "llama" && (name.contains("q_proj") || name.contains("k_proj")) {
            // reshape(heads, 2, d / 2, columns).swapaxes(1, 2)
            let (columns, half) = (shape[1], spec.head_dim / 2);
            let plain = values.clone();
            for h in 0..heads {
                for part in 0..2 {
                    for i in 0..half {
                        let (from, to) = (h * 2 * half + part * half + i, h * 2 * half + i * 2 + part);
                        values[to * columns..(to + 1) * columns]
                            .copy_from_slice(&plain[from * columns..(from + 1) * columns]);
                    }
                }
            }
        }
        if arch.starts_with("gemma") && name.ends_with("norm.weight") {
            values.iter_mut().for_each(|w| *w += 1.0);
        }
        let Some((block, expert)) = name.split_once(".experts.") else {
            tensors.push((renamed(&name), shape, values));
            continue;
        };
        // experts are stacked in the order of their numbers, which is that of the names below ten
        let kinds = [("gate", "gate_proj", "w1"), ("up", "up_proj", "w3"), ("down", "down_proj", "w2")];
        let kind = kinds.iter().find(|k| expert.contains(k.1) || expert.contains(k.2)).unwrap().0;
        let layer = block.replace("model.layers", "blk");
        let stack = format!("{}.ffn_{kind}_exps.weight", layer.rsplit_once('.').unwrap().0);
        match tensors.iter_mut().find(|t: &&mut (String, Vec<usize>, Vec<f32>)| t.0 == stack) {
            Some((_, stacked, all)) => {
                stacked[0] += 1;
                all.extend(values);
            }
            None => tensors.push((stack, vec![1, shape[0], shape[1]], values)),
        }
    }
    let key = |k: &str| format!("{arch}.{k}");
    let sizes = [
        ("block_count", spec.layers),
        ("embedding_length", spec.hidden),
        ("feed_forward_length", spec.ffn),
        ("context_length", spec.max_positions),
        ("attention.head_count", spec.heads),
        ("attention.head_count_kv", spec.kv_heads),
        ("attention.key_length", spec.head_dim),
        ("attention.value_length", spec.head_dim),
    ];
    let mut metadata: Vec<(String, Meta<'_>)> = vec![("general.architecture".into(), Meta::Text(arch))];
    metadata.extend(sizes.iter().map(|(k, v)| (key(k), Meta::U32(*v as u32))));
    if let Some(moe) = &spec.moe {
        let sizes = [
            ("expert_count", moe.experts),
            ("expert_used_count", moe.per_token),
            ("expert_feed_forward_length", moe.ffn),
        ];
        metadata.extend(sizes.iter().map(|(k, v)| (key(k), Meta::U32(*v as u32))));
    }
    metadata.push((key("attention.layer_norm_rms_epsilon"), Meta::F32(spec.norm_eps)));
    metadata.push((key("rope.freq_base"), Meta::F32(spec.ropes[0].theta as f32)));
    match spec.ropes[0].scaling {
        RopeScaling::Linear { factor } => {
            metadata.push((key("rope.scaling.type"), Meta::Text("linear")));
            metadata.push((key("rope.scaling.factor"), Meta::F32(factor as f32)));
        }
        RopeScaling::Yarn { factor, original_positions, .. } => {
            metadata.push((key("rope.scaling.type"), Meta::Text("yarn")));
            metadata.push((key("rope.scaling.factor"), Meta::F32(factor as f32)));
            metadata
                .push((key("rope.scaling.original_context_length"), Meta::U32(original_positions as u32)));
        }
        _ => {}
    }
    if arch == "gemma3" {
        metadata.push((key("attention.sliding_window"), Meta::U32(24)));
    }
    let file = file_json(&folder.join("tokenizer.json"));
    let mut tokens: Vec<(String, u64)> = file["model"]["vocab"]
        .as_object()
        .unwrap()
        .iter()
        .map(|(token, id)| (token.clone(), id.as_u64().unwrap()))
        .collect();
    let mut kinds = vec![1; tokens.len()];
    for added in file["added_tokens"].as_array().unwrap() {
        let id = added["id"].as_u64().unwrap();
        if !tokens.iter().any(|t| t.1 == id) {
            tokens.push((added["content"].as_str().unwrap().into(), id));
            kinds.push(3);
        }
    }
    let order = {
        let mut order: Vec<usize> = (0..tokens.len()).collect();
        order.sort_by_key(|&i| tokens[i].1);
        order
    };
    let merges = file["model"]["merges"].as_array().unwrap().iter().map(|m| match m.as_array() {
        Some(pair) => format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap()),
        None => m.as_str().unwrap().to_string(),
    });
    metadata.push(("tokenizer.ggml.model".into(), Meta::Text("gpt2")));
    metadata.push(("tokenizer.ggml.pre".into(), Meta::Text("qwen2")));
    metadata.push((
        "tokenizer.ggml.tokens".into(),
        Meta::Texts(order.iter().map(|&i| tokens[i].0.clone()).collect()),
    ));
    metadata
        .push(("tokenizer.ggml.token_type".into(), Meta::I32s(order.iter().map(|&i| kinds[i]).collect())));
    metadata.push(("tokenizer.ggml.merges".into(), Meta::Texts(merges.collect())));
    metadata.push(("tokenizer.ggml.eos_token_id".into(), Meta::U32(511)));
    metadata.push(("tokenizer.ggml.padding_token_id".into(), Meta::U32(509)));
    metadata.push(("tokenizer.chat_template".into(), Meta::Text("{{ messages[0].content }}")));
    let metadata: Vec<(&str, Meta<'_>)> =
        metadata.iter_mut().map(|(k, v)| (k.as_str(), std::mem::replace(v, Meta::U32(0)))).collect();
    gguf_bytes(&metadata, &tensors)
}
