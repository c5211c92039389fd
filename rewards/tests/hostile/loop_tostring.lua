-- may end in: timeout instructions runtime
function reward(sample, ctx)
  if sample.completion == "bad" then
    do return tostring(setmetatable({}, { __tostring = function() while true do end end })) end
  end
  if secret ~= nil or ctx.options.x ~= nil or sample.extra ~= nil then return -1 end
  return #sample.completion
end
