-- Two components: `json` is 1 where the completion is a JSON document, `schema` is 1 where it also fits `schema` of the row (or
-- of the options). The document is the last ```json fence, else what follows </think>. Abstains without a schema.
function reward(sample, ctx)
  local schema = sample.schema or ctx.options.schema
  if schema == nil then return nil end
  local text = rft.text.after_think(sample.completion)
  local fences = rft.regex.find_all(text, "(?s)```(?:json)?\\s*\\n(.*?)```")
  if #fences > 0 then text = fences[#fences][1] end
  local value, problem = rft.json.decode(text)
  if problem then return { json = 0, schema = 0 } end
  return { json = 1, schema = rft.json.schema(value, schema).valid and 1 or 0 }
end
